"""Position of a rendered conversation's tokens, in the text and in the coordinates that all models share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from stages.contract.roles import TURN_END, Role
from stages.models.byte_offsets import character_positions, ends_by_bytes, ends_by_offsets
from stages.models.conversations.template import Rendered
from stages.models.segment_text import Message

_TURN_END_BYTES = len(TURN_END.encode())


@dataclass(frozen=True, eq=False)
class Tokens:
    """The N tokens of a rendered conversation.

    Attributes:
        ids: N ids.
        start, end: (N,) int64; the bytes of the rendering that each token came from. White space that a tokenizer drops is
            between two tokens; the space that it adds is in none.
        is_control: (N,) bool; one of the tokens that a template structures a conversation with.
    """

    ids: list[int]
    start: np.ndarray
    end: np.ndarray
    is_control: np.ndarray


def find_tokens(
    text: str,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    pieces: Sequence[bytes],
    *,
    is_added: np.ndarray,
    is_control: np.ndarray,
) -> Tokens:
    """Find the bytes of each token.

    Added tokens split a text before anything else, and their offsets are exact. What stands between two of them is a text of
    its own to the tokenizer: it may begin with a space that the text does not have.

    Args:
        text: the rendering.
        ids: N ids.
        offsets: N half-open spans of characters, as the `tokenizers` library gives them.
        pieces: N tokens' bytes; those of added tokens are not looked at.
        is_added: (N,) bool, the tokenizer's added tokens.
        is_control: (N,) bool; a subset of them.
    """
    position = character_positions(text.encode())
    spans = np.asarray(offsets, np.int64).reshape(-1, 2)
    start, end = position[spans[:, 0]], position[spans[:, 1]]
    for first, stop, begins, ends in _runs(is_added, spans, len(text)):
        run = slice(first, stop)
        chunk = text[begins:ends]
        exact = ends_by_bytes(chunk.encode(), pieces[run])
        if exact is None:
            shifted = np.clip(spans[run] - begins, 0, len(chunk))
            run_end = ends_by_offsets(chunk, pieces[run], [(int(low), int(high)) for low, high in shifted])
            own_start = character_positions(chunk.encode())[shifted[:, 0]]
        else:
            run_end = exact
            own_start = np.zeros(stop - first, np.int64)
        run_start = np.minimum(np.maximum(own_start, np.append(0, run_end[:-1])), run_end)
        start[run], end[run] = position[begins] + run_start, position[begins] + run_end
    return Tokens(list(ids), start, end, is_control)


def _runs(is_added: np.ndarray, spans: np.ndarray, length: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield the runs of tokens between added ones: first token, one past the last, and the characters of the run."""
    begins, first = 0, 0
    for index in [*np.flatnonzero(is_added).tolist(), len(is_added)]:
        is_end = index == len(is_added)
        if index > first:
            yield first, index, begins, length if is_end else int(spans[index, 0])
        if not is_end:
            begins, first = int(spans[index, 1]), index + 1


def control_tokens_in_contents(tokens: Tokens, rendered: Rendered) -> list[int]:
    """Return the places of control tokens that came from a content; a content may hold the text of one."""
    pieces = _piece_spans(rendered)
    raw = rendered.text.encode()
    indices = []
    for index in np.flatnonzero(tokens.is_control).tolist():
        low, high = _core(raw, tokens, index)
        if not any(start <= low and high <= end for start, end in pieces):
            indices.append(index)
    return indices


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Position and role of the N tokens of a conversation; see ``stages.models.tokenizer.Encoding``.

    Attributes:
        byte_end: (N,) int32.
        role: (N,) uint8.
        is_trained: (N,) bool.
    """

    byte_end: np.ndarray
    role: np.ndarray
    is_trained: np.ndarray


def in_common_coordinates(
    tokens: Tokens, rendered: Rendered, messages: Sequence[Message], turn_end_id: int
) -> Coordinates:
    """Work out what each token is to the conversation.

    - A token with bytes of a content is TEXT, and ends where these end, in the last message that it reaches into.
    - The first control token behind a content is EOS, if it is the one that ends the assistant's turns.
    - The last token before a content is START if nothing but white space follows it, which the content's first token writes.
    - All others are TEMPLATE, and end where the content position stands: at the end of the content before until its turn has
      ended, then at the beginning of the next message.

    Bytes that a template takes off a content, and white space that a control token swallows, belong to the token behind.

    Args:
        tokens: N tokens; no control token came from a content.
        rendered: the conversation as the template writes it.
        messages: its M messages.
        turn_end_id: the token that ends the assistant's turns.
    """
    raw = rendered.text.encode()
    spans = _content_spans(rendered)
    # bases[m]: where message m begins in the common coordinates; the last is the length of the whole.
    bases = np.cumsum([0, *(len(message.content.encode()) + _TURN_END_BYTES for message in messages)]).tolist()
    start, end = _without_swallowed(raw, tokens, rendered)
    num_tokens = len(tokens.ids)
    byte_end = np.zeros(num_tokens, np.int32)
    role = np.full(num_tokens, Role.TEMPLATE, np.uint8)
    is_trained = np.zeros(num_tokens, np.bool_)

    # 1. Tokens with bytes of a content; the others by the piece of the template that they stand in.
    pieces: list[list[int]] = [[] for _ in range(len(messages) + 1)]
    following = 0  # the first message whose content is not behind the token
    for index, (low, high) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        while following < len(spans) and low >= spans[following][1] and high > spans[following][0]:
            following += 1
        message = None if tokens.is_control[index] else _last_inside(spans, following, low, high)
        if message is None:
            pieces[following].append(index)
            continue
        following = message
        begins, ends = spans[message]
        role[index], is_trained[index] = Role.TEXT, messages[message].is_trained
        byte_end[index] = bases[message] + rendered.num_dropped[message] + min(high, ends) - begins

    # 2. Tokens of the template: the end of a turn, the beginning of the next message, and what is neither.
    for number, indices in enumerate(pieces):
        byte_end[indices] = bases[number]
        control = next((index for index in indices if tokens.is_control[index]), None)
        if number > 0 and control is not None and tokens.ids[control] == turn_end_id:
            role[control], is_trained[control] = Role.EOS, messages[number - 1].is_trained
            begins, ends = spans[number - 1]
            content_end = bases[number - 1] + (rendered.num_dropped[number - 1] + ends - begins if ends > begins else 0)
            byte_end[[index for index in indices if index < control]] = content_end
        if indices and number < len(messages):
            stands, begins = int(end[indices[-1]]), spans[number][0]
            is_space = not raw[stands:begins].decode(errors="replace").strip()
            if role[indices[-1]] != Role.EOS and stands <= begins and is_space:
                role[indices[-1]] = Role.START
    return Coordinates(byte_end, role, is_trained)


def _last_inside(spans: Sequence[tuple[int, int]], following: int, low: int, high: int) -> int | None:
    """Return the last message, from ``following`` on, of whose content a token holds bytes, or stands strictly inside."""
    last = None
    for number in range(following, len(spans)):
        begins, ends = spans[number]
        if begins >= high:
            break
        if low < ends and begins < ends:
            last = number
    return last


def _content_spans(rendered: Rendered) -> list[tuple[int, int]]:
    """Return where contents stand in the rendering, bytes."""
    spans, position = [], 0
    for piece, content in zip(rendered.pieces, rendered.contents, strict=False):
        begins = position + len(piece.encode())
        position = begins + len(content.encode())
        spans.append((begins, position))
    return spans


def _piece_spans(rendered: Rendered) -> list[tuple[int, int]]:
    """Return where the template's pieces stand in the rendering, bytes."""
    contents = _content_spans(rendered)
    starts = [0, *(end for _, end in contents)]
    ends = [*(start for start, _ in contents), len(rendered.text.encode())]
    return list(zip(starts, ends, strict=True))


def _core(raw: bytes, tokens: Tokens, index: int) -> tuple[int, int]:
    """Return the bytes of a token without the white space that it swallowed around itself."""
    low, high = int(tokens.start[index]), int(tokens.end[index])
    text = raw[low:high].decode("utf-8", errors="ignore")
    return low + len(text[: len(text) - len(text.lstrip())].encode()), high - len(text[len(text.rstrip()) :].encode())


def _without_swallowed(raw: bytes, tokens: Tokens, rendered: Rendered) -> tuple[np.ndarray, np.ndarray]:
    """Return starts and ends of the tokens, white space of contents that control tokens swallowed left out."""
    start, end = tokens.start.copy(), tokens.end.copy()
    pieces = _piece_spans(rendered)
    for index in np.flatnonzero(tokens.is_control).tolist():
        low, high = _core(raw, tokens, index)
        begins, ends = next(piece for piece in pieces if piece[0] <= low and high <= piece[1])
        start[index], end[index] = max(int(start[index]), begins), min(int(end[index]), ends)
    return start, end
