"""Message of a conversation that each token belongs to, for people: ``inspect`` and the page's viewer."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from stages.contract.columns import find_row, list_row
from stages.contract.roles import Role, has_roles
from stages.contract.schemas import has_conversations


@dataclass(frozen=True)
class Turn:
    """Consecutive tokens of a segment that a reader takes for one message.

    Attributes:
        role: role of the message.
        is_trained: the message is trained on.
        start: its first token; the template's tokens before the content are among its tokens.
        end: one past its last one.
    """

    role: str
    is_trained: bool
    start: int
    end: int


@dataclass(frozen=True)
class SegmentTurns:
    """The turns of a segment of N tokens.

    Attributes:
        turns: in order; together they have all tokens.
        is_template: (N,) bool, the token has no bytes of a content.
    """

    turns: tuple[Turn, ...]
    is_template: np.ndarray


def segment_turns(shard: pa.Table, logits: pa.Table, row: int) -> SegmentTurns | None:
    """Return the turns of a segment; None for plain text.

    Args:
        shard: the table of the ``shard`` stage that has the segment.
        logits: a model's table of the same shard.
        row: row number in ``logits``.
    """
    if not has_roles(logits) or not has_conversations(shard.schema):
        return None
    place = find_row(shard, logits["doc_id"][row].as_py(), logits["segment"][row].as_py())
    ends, byte_end, roles = (
        list_row(shard, "message_end", place),
        list_row(logits, "byte_end", row),
        list_row(logits, "role", row),
    )
    message = message_of_tokens(ends, byte_end, roles)
    borders = np.flatnonzero(np.diff(message)) + 1
    starts, stops = np.append(0, borders), np.append(borders, len(message))
    names, trained = shard["message_role"][place].as_py(), shard["message_trained"][place].as_py()
    turns = tuple(
        Turn(names[message[start]], trained[message[start]], int(start), int(stop))
        for start, stop in zip(starts, stops, strict=True)
        if stop > start
    )
    return SegmentTurns(turns, roles != Role.TEXT)


def message_of_tokens(message_end: np.ndarray, byte_end: np.ndarray, roles: np.ndarray) -> np.ndarray:
    """Return the index of the message that each token belongs to, (N,) int64, nondecreasing.

    The template's tokens belong to the message that they lead to; after the last message, to that one.

    Args:
        message_end: (M,) where messages end in the segment's text, bytes.
        byte_end: (N,) where tokens end.
        roles: (N,) values of ``Role``.
    """
    has_bytes = (roles == Role.TEXT) | (roles == Role.EOS)
    inside = np.searchsorted(message_end, byte_end, side="left")
    leads_to = np.searchsorted(message_end, byte_end, side="right")
    message = np.minimum(np.where(has_bytes, inside, leads_to), len(message_end) - 1)
    return np.maximum.accumulate(message)
