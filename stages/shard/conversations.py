"""Read conversations as data sets hold them, and cut them between turns."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np

from stages.contract.roles import TURN_END
from stages.models.conversations.template import RenderError
from stages.models.segment_text import Message, SegmentText
from stages.models.tokenizer import Encoding, SegmentTokenizer

_ROLES: Final = {
    **{role: role for role in ("system", "user", "assistant")},
    "human": "user",  # ShareGPT's
    "gpt": "assistant",
}
_TOOL_ROLES: Final = frozenset(
    {
        *("tool", "tool_call", "tool_calls", "tool_response", "function", "function_call", "function_response"),
        *("observation", "ipython"),
    }
)
_KEYS: Final = (("role", "content"), ("from", "value"))
_TOOL_KEYS: Final = ("tool_calls", "function_call", "tool_call_id", "tools")
_MEDIA_KEYS: Final = ("images", "image", "audio", "videos", "video")
_REASONING_KEYS: Final = ("reasoning_content", "reasoning", "thinking")


class ConversationError(ValueError):
    """A conversation that is not trained on.

    Attributes:
        kind: class of the reason, as quarantine and figures call it: "NotAConversation", "UnknownRole", "HasTools", "HasMedia",
            "OtherContent", "InvalidUtf8", "CannotRender" or "CannotCut".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def read_conversation(raw: bytes, train_on: Literal["assistant", "all"]) -> tuple[Message, ...]:
    """Read a conversation.

    A system message without text at its beginning is left out: data sets write one where there is none, and many templates drop
    it while others write their own.

    Args:
        raw: JSON, a list of objects with ``role`` and ``content``, or with ShareGPT's ``from`` and ``value``.
        train_on: messages to train on.

    Raises:
        ConversationError: it is none, or holds something else than text; says which message, and what was found.
    """
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConversationError(
            "InvalidUtf8",
            f"not UTF-8 at byte {error.start} of {len(raw)}: {raw[error.start : error.end]!r}, {error.reason}",
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConversationError(
            "NotAConversation", f"expected a list of messages, or JSON of one; found {_shown(raw)}: {error}"
        ) from error
    if not isinstance(value, list):
        raise ConversationError(
            "NotAConversation", f"expected a list of messages, found {type(value).__name__}: {_shown(raw)}"
        )
    messages = []
    for index, item in enumerate(value):
        role, content = _read_message(index, item)
        if index == 0 and role == "system" and not content.strip():
            continue
        messages.append(Message(role, content, is_trained=train_on == "all" or role == "assistant"))
    return tuple(messages)


def canonical_bytes(messages: Sequence[Message]) -> bytes:
    """Return what decides the split of a conversation: the same, however a data set writes it."""
    return json.dumps([[message.role, message.content] for message in messages], ensure_ascii=False).encode()


def _read_message(index: int, item: Any) -> tuple[str, str]:
    if not isinstance(item, dict):
        raise ConversationError(
            "NotAConversation",
            f"message {index} is {type(item).__name__}, expected an object with role and content: {str(item)[:40]!r}",
        )
    spellings = [keys for keys in _KEYS if keys[0] in item]
    if not spellings:
        present = ", ".join(map(repr, list(item)[:20])) or "no key"
        raise ConversationError(
            "NotAConversation", f"message {index} has no key 'role' (or ShareGPT's 'from'); found {present}"
        )
    # Data sets in Parquet that mix both spellings have all four keys in every message, and null under two of them.
    role_key, content_key = next((keys for keys in spellings if item[keys[0]] is not None), spellings[0])
    name, content = item[role_key], item.get(content_key)
    used = next((key for key in _TOOL_KEYS if item.get(key)), None)
    if used is not None or (isinstance(name, str) and name in _TOOL_ROLES):
        obstacle = f"has {used}" if used is not None else f"is of the role {name!r}"
        raise ConversationError(
            "HasTools", f"message {index} {obstacle}: conversations that use tools are not supported"
        )
    if not isinstance(name, str) or name not in _ROLES:
        raise ConversationError(
            "UnknownRole",
            f"message {index} is of the role {_shown_value(name)}; expected one of {', '.join(map(repr, _ROLES))}",
        )
    where = f"message {index} ({name})"
    media = _find_media(item, content)
    if media is not None:
        raise ConversationError("HasMedia", f"{where} holds {media}: expected only text")
    reasoning = next((key for key in _REASONING_KEYS if item.get(key)), None)
    if reasoning is not None:
        raise ConversationError(
            "OtherContent",
            f"{where} has {reasoning} besides its content: expected only content (put the reasoning into it, or drop "
            "it)",
        )
    if not isinstance(content, str):
        raise ConversationError(
            "OtherContent",
            f"the content of {where} is {'null' if content is None else type(content).__name__}, expected a string",
        )
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(
            "InvalidUtf8", f"the content of {where} holds half of a surrogate pair at character {error.start}"
        ) from error
    return _ROLES[name], content


def _find_media(item: dict[str, Any], content: Any) -> str | None:
    """Return what a message holds that is not text, if it says so."""
    key = next((key for key in _MEDIA_KEYS if item.get(key)), None)
    if key is not None:
        return key
    content_parts = content if isinstance(content, list) else [content]
    kinds = (str(content_part.get("type", "")) for content_part in content_parts if isinstance(content_part, dict))
    return next((kind for kind in kinds if kind.removesuffix("_url").removeprefix("input_") in _MEDIA_KEYS), None)


def _shown_value(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}..."


def _shown(raw: bytes) -> str:
    return repr(raw[:40].decode("utf-8", errors="replace"))


@dataclass(frozen=True)
class Piece:
    """A segment of a conversation.

    Attributes:
        text: its messages; the system's first, where it stands before the whole conversation.
        byte_start: byte offset of the first message that is not repeated in the conversation's text.
        num_new_bytes: length of the messages that are not repeated, bytes.
        num_tokens: for each tokenizer, its tokens.
    """

    text: SegmentText
    byte_start: int
    num_new_bytes: int
    num_tokens: tuple[int, ...]


def cut_conversations(
    conversations: Sequence[Sequence[Message]],
    tokenizers: Sequence[SegmentTokenizer],
    max_length: int,
    names: Sequence[str],
) -> list[list[Piece] | ConversationError]:
    """Cut conversations into segments of at most ``max_length`` tokens under every tokenizer.

    A cut falls before a user's message, so that every segment is a conversation by itself; the system's message stands before
    each again, where it is not trained on. Segments without anything to train on are left out.

    Args:
        conversations: not empty ones.
        tokenizers: those of the run.
        max_length: tokens.
        names: their models' names, for messages.

    Returns:
        For each conversation its segments, of which none may be left, or why it has no cut.
    """
    whole = [SegmentText.conversation(messages) for messages in conversations]
    encodings = [tokenizer.try_encode_segments(whole) for tokenizer in tokenizers]
    cut: list[list[Piece] | ConversationError] = []
    for messages, segment, results in zip(conversations, whole, zip(*encodings, strict=True), strict=True):
        try:
            encoded = _refuse_errors(results, names)
            if all(len(encoding.ids) <= max_length for encoding in encoded):
                num_tokens = tuple(len(encoding.ids) for encoding in encoded)
                pieces = [Piece(segment, 0, len(segment.text.encode()), num_tokens)]
            else:
                pieces = _cut(messages, encoded, tokenizers, max_length, names)
        except ConversationError as error:
            cut.append(error)
        else:
            trained_pieces = [piece for piece in pieces if any(message.is_trained for message in piece.text.messages)]
            cut.append(
                [
                    replace(piece, text=replace(piece.text, is_last=piece is trained_pieces[-1]))
                    for piece in trained_pieces
                ]
                if trained_pieces
                else []
            )
    return cut


def _refuse_errors(results: Sequence[Encoding | RenderError], names: Sequence[str]) -> list[Encoding]:
    for name, encoding in zip(names, results, strict=True):
        if isinstance(encoding, RenderError):
            raise ConversationError("CannotRender", f"model {name}: {encoding}")
    return [encoding for encoding in results if isinstance(encoding, Encoding)]


def _cut(
    messages: Sequence[Message],
    encoded: Sequence[Encoding],
    tokenizers: Sequence[SegmentTokenizer],
    max_length: int,
    names: Sequence[str],
) -> list[Piece]:
    """Cut a conversation that does not fit: as many exchanges to a piece as there is room for."""
    has_system = messages[0].role == "system"
    system = [replace(messages[0], is_trained=False)] if has_system else []
    starts = _exchanges(messages, first=int(has_system))
    bases = np.cumsum([0, *(len((message.content + TURN_END).encode()) for message in messages)]).tolist()
    sizes = np.array([_tokens_between(encoding, [bases[index] for index in starts]) for encoding in encoded])
    pieces: list[Piece] = []
    first = 0
    while first < len(starts) - 1:
        # Tokens do not add up exactly: the first guess may be too large, and then ends an exchange earlier.
        room = max_length - sizes[:, :1]
        fitting = np.all(np.cumsum(sizes[:, 1 + first :], axis=1) <= room, axis=0)
        stop = first + max(1, int(fitting.argmin() if not fitting.all() else len(fitting)))
        while True:
            begins = [messages[0]] if first == 0 and has_system else system
            new_messages = messages[starts[first] : starts[stop]]
            segment = SegmentText.conversation([*begins, *new_messages])
            counts = [
                len(encoding.ids)
                for encoding in _refuse_errors(
                    [tokenizer.try_encode_segments([segment])[0] for tokenizer in tokenizers], names
                )
            ]
            is_learnt = any(message.is_trained for message in segment.messages)
            # A question without an answer at the end may have any length: such a piece is left out.
            if max(counts) <= max_length or (stop == first + 1 and not is_learnt):
                break
            if stop == first + 1:
                longest = int(np.argmax(counts))
                which = _describe_exchange(starts[first], starts[stop], counts[longest], has_system=has_system)
                raise ConversationError(
                    "CannotCut",
                    f"{which} under model {names[longest]}, and an exchange is never cut: expected at most {max_length}; "
                    "raise shard.max_length",
                )
            stop -= 1
        begins_at = 0 if first == 0 else bases[starts[first]]
        pieces.append(Piece(segment, begins_at, bases[starts[stop]] - begins_at, tuple(counts)))
        first = stop
    return pieces


def _describe_exchange(start: int, stop: int, num_tokens: int, *, has_system: bool) -> str:
    """Return the length of messages ``start`` to ``stop - 1`` in words; there are none where the system speaks alone."""
    if start == stop:
        return f"the system message has {num_tokens} tokens"
    which = f"message {start} has" if stop == start + 1 else f"messages {start} to {stop - 1} have"
    return f"{which} {num_tokens} tokens{' with the system message' if has_system else ''}"


def _exchanges(messages: Sequence[Message], *, first: int) -> list[int]:
    """Return where exchanges begin, and one past the last message: at a user's message behind another speaker's."""
    begins = [
        index
        for index in range(first + 1, len(messages))
        if messages[index].role == "user" and messages[index - 1].role != "user"
    ]
    return [first, *begins, len(messages)]


def _tokens_between(encoding: Encoding, bases: Sequence[int]) -> list[int]:
    """Count the tokens before the first of some places in the common coordinates, and between each and the next."""
    ends = np.searchsorted(encoding.byte_end, bases, side="right").tolist()
    return np.diff([0, *ends[:-1], len(encoding.ids)]).tolist()
