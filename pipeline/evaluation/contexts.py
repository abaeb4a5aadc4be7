"""Contexts of an ensemble: what a source has read where the target predicts its next token.

The source reads the same bytes as the target, in its own tokens. docs/baselines.md says which of these functions is used when.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from stages.contract.roles import Role
from stages.models.segment_text import SegmentText
from stages.models.tokenizer import Encoding, SegmentTokenizer


@dataclass(frozen=True)
class Contexts:
    """Token sequences that a source reads, and the context in them of each of M target tokens.

    Attributes:
        sequences: token ids of the source, none of which begins another.
        sequence: (M,) which of them the position's context begins; -1: the source predicts nothing there.
        position: (M,) the last token of the context in it.
    """

    sequences: tuple[np.ndarray, ...]
    sequence: np.ndarray
    position: np.ndarray


def prefix_contexts(text: str, byte_end: np.ndarray, tokenizer: SegmentTokenizer) -> Contexts:
    """Tokenize, for each position, the text up to its end with the source's tokenizer, so that no later text is used.

    Args:
        text: the segment's.
        byte_end: (M,) where the target's tokens end.
        tokenizer: the source's.

    Returns:
        No context at the last position, which predicts nothing in the segment; where the target's token ends inside a
        character; and where the source has no token to read (no BOS, at the text's begin).
    """
    raw = text.encode()
    prefixes = {end: prefix for end in byte_end[:-1].tolist() if (prefix := _decoded(raw[:end])) is not None}
    encodings = tokenizer.encode_batch(list(prefixes.values()), is_last=[False] * len(prefixes))
    ids = {end: encoding.ids for end, encoding in zip(prefixes, encodings, strict=True)}
    return cover([ids.get(end) for end in byte_end.tolist()])


def segment_contexts(source: Encoding, byte_end: np.ndarray) -> Contexts:
    """Take, for each position, the source's tokens of the segment up to the last one that ends at the same byte.

    Args:
        source: the segment's tokens, without EOS.
        byte_end: (M,) where the target's tokens end.
    """
    last = np.searchsorted(source.byte_end, byte_end, side="right")
    ends = byte_end[:-1]
    contexts: list[np.ndarray | None] = [
        source.ids[:count] if count and source.byte_end[count - 1] == end else None
        for count, end in zip(last[:-1].tolist(), ends.tolist(), strict=True)
    ]
    shares = len(ends) > 0 and ends[-1] == byte_end[-1]  # an EOS ends where the text does
    return cover([*contexts, *([contexts[-1] if shares else None] if len(byte_end) else [])])


def message_contexts(segment: SegmentText, target: Encoding, tokenizer: SegmentTokenizer) -> Contexts:
    """Render, for each position of a conversation, the messages up to its end with the source's template.

    Args:
        segment: the conversation.
        target: its tokens.
        tokenizer: the source's.

    Returns:
        No context where the next token is not trained on; where the target's token is one of the template, or ends inside a
        character; and where the source's template trims what was read of the message last.
    """
    ends = np.cumsum([len(message.content.encode()) + 1 for message in segment.messages])
    wanted = _asked_positions(target)
    prefixes: dict[int, SegmentText] = {}
    for end in sorted({int(target.byte_end[position]) for position in wanted}):
        index = int(np.searchsorted(ends, end, side="right"))
        message = segment.messages[index]
        read = _decoded(message.content.encode()[: end - (int(ends[index - 1]) if index else 0)])
        if read is not None:
            prefixes[end] = SegmentText.conversation([*segment.messages[:index], replace(message, content=read)])
    encodings = dict(zip(prefixes, tokenizer.try_encode_segments(list(prefixes.values())), strict=True))
    contexts: list[np.ndarray | None] = [None] * len(target.ids)
    for position in wanted:
        encoding = encodings.get(int(target.byte_end[position]))
        if isinstance(encoding, Encoding):
            contexts[position] = _up_to(encoding, target, position)
    return cover(contexts)


def conversation_contexts(source: Encoding, target: Encoding) -> Contexts:
    """Take, for each position, the source's tokens of the whole conversation up to the one that has read as much.

    Args:
        source: the conversation's tokens.
        target: the target's.
    """
    contexts: list[np.ndarray | None] = [None] * len(target.ids)
    for position in _asked_positions(target):
        contexts[position] = _up_to(source, target, position)
    return cover(contexts)


def _asked_positions(target: Encoding) -> list[int]:
    """Return the positions of a conversation whose next token is trained on, in a message or right before one."""
    assert target.role is not None and target.is_trained is not None  # noqa: PT018 - a conversation has both
    has_label = np.append(target.is_trained[1:], False)[: len(target.ids)]
    return np.flatnonzero(has_label & (target.role != Role.TEMPLATE)).tolist()


def _up_to(source: Encoding, target: Encoding, position: int) -> np.ndarray | None:
    """Return the source's tokens up to the last one that has read the same bytes of the same message.

    None where there is none, and where the turn ends and the source's template writes something else before its end: what it
    expects there is said of that.
    """
    assert source.role is not None and target.role is not None  # noqa: PT018 - both are conversations
    alike = (source.byte_end == target.byte_end[position]) & (source.role == target.role[position])
    ends = np.flatnonzero(alike)
    if not len(ends):
        return None
    end = int(ends[-1]) + 1
    if target.role[position + 1] == Role.EOS and source.role[end : end + 1].tolist() != [Role.EOS]:
        return None
    return source.ids[:end]


def cover(contexts: Sequence[np.ndarray | None]) -> Contexts:
    """Put contexts that begin one another into one sequence, so that one pass of the model gives all of them.

    Args:
        contexts: (N,) token ids each; None or empty: nothing to read.
    """
    raw = [b"" if ids is None else np.ascontiguousarray(ids, np.int32).tobytes() for ids in contexts]
    kept: list[bytes] = []
    sequence_of: dict[bytes, int] = {b"": -1}
    for context in sorted(set(raw), key=lambda ids: (-len(ids), ids)):
        if not context:
            continue
        index = next((index for index, longer in enumerate(kept) if longer.startswith(context)), len(kept))
        if index == len(kept):
            kept.append(context)
        sequence_of[context] = index
    width = np.dtype(np.int32).itemsize
    return Contexts(
        sequences=tuple(np.frombuffer(ids, np.int32) for ids in kept),
        sequence=np.array([sequence_of[context] for context in raw], np.int64),
        position=np.array([len(context) // width - 1 for context in raw], np.int64),
    )


def _decoded(raw: bytes) -> str | None:
    """Decode a text; None if it ends inside a character."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None
