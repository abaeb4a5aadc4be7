"""Segments as tokenizers receive them: plain texts, or the messages of a conversation."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import pyarrow as pa

from stages.contract.roles import TURN_END
from stages.contract.schemas import has_conversations


@dataclass(frozen=True)
class Message:
    """Message of a conversation.

    Attributes:
        role: "system", "user" or "assistant".
        content: the text, as the dataset has it.
        is_trained: whether the message, including its end, is trained on.
    """

    role: str
    content: str
    is_trained: bool


@dataclass(frozen=True)
class SegmentText:
    """A segment as tokenizers receive it.

    Attributes:
        text: the text; of a conversation, each message's content and ``TURN_END`` after it.
        is_last: whether its document ends here.
        messages: messages of a conversation; none for plain text.
    """

    text: str
    is_last: bool
    messages: tuple[Message, ...] = ()

    @classmethod
    def conversation(cls, messages: Iterable[Message], *, is_last: bool = True) -> Self:
        """Return the segment that consists of these messages."""
        messages = tuple(messages)
        return cls("".join(message.content + TURN_END for message in messages), is_last, messages)


def segment_texts(shard: pa.Table) -> list[SegmentText]:
    """Return the segments of a table of ``shard``, whichever kind it holds.

    Raises:
        ValueError: the ends of a row's messages are not those of its text; says which row.
    """
    texts, is_last = shard["text"].to_pylist(), shard["is_last"].to_pylist()
    if not has_conversations(shard.schema):
        return [SegmentText(text, last) for text, last in zip(texts, is_last, strict=True)]
    columns = [shard[name].to_pylist() for name in ("message_role", "message_end", "message_trained")]
    segments = []
    for row, (text, last, *messages) in enumerate(zip(texts, is_last, *columns, strict=True)):
        try:
            segments.append(SegmentText(text, last, tuple(_messages(text.encode(), *messages))))
        except ValueError as error:
            raise ValueError(f"row {row} of the shard: {error}") from error
    return segments


def _messages(raw: bytes, roles: list[str], ends: list[int], trained: list[bool]) -> Iterator[Message]:
    """Take a conversation's text apart again: contents may hold ``TURN_END`` themselves, so the ends decide."""
    end_mark: Any = TURN_END.encode()
    start = 0
    for role, end, is_trained in zip(roles, ends, trained, strict=True):
        if not raw[start:end].endswith(end_mark):
            raise ValueError(f"no message ends at byte {end} of its text: the file was not written by `shard`")
        yield Message(role, raw[start : end - 1].decode(), is_trained)
        start = end
    if start != len(raw):
        raise ValueError(f"its messages end at byte {start}, and its text has {len(raw)} bytes")
