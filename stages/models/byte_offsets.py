"""Byte position at which each token of a text ends, in UTF-8: exact for every family of tokenizers.

Two ways. Where the tokens' bytes, end to end, are the text (byte-level BPE, SentencePiece with byte fallback: nearly
always), the answer is their running sum. Where a normaliser changed the text (NFC, NFKC, lower-casing, white space
dropped), the tokenizer's character offsets say which characters each token came from, and tokens that share a character
are put inside it. A token that only finishes a character ends at that character's end; white space that a tokenizer
drops belongs to the token after it, as in `` the``; a combining mark that was composed away belongs to the one before.
"""

from collections.abc import Sequence

import numpy as np

METASPACE = "▁"


def character_positions(raw: bytes) -> np.ndarray:
    """Return the byte position at which each character begins.

    Args:
        raw: UTF-8.

    Returns:
        (C + 1,) int64 byte positions; the last is the length.
    """
    starts = np.flatnonzero((np.frombuffer(raw, np.uint8) & 0xC0) != 0x80)
    return np.append(starts, len(raw))


def ends_by_bytes(raw: bytes, pieces: Sequence[bytes]) -> np.ndarray | None:
    """Compute token ends as the running sum of the tokens' lengths, if the tokens spell the text.

    Args:
        raw: the text, UTF-8.
        pieces: N tokens' bytes. A space in front that the text does not have (a dummy prefix) is forgiven.

    Returns:
        (N,) int64 byte positions; None if the tokens do not spell the text.
    """
    joined = b"".join(pieces)
    extra = len(joined) - len(raw)
    if not (extra == 0 and joined == raw) and not (extra == 1 and joined.startswith(b" ") and joined.endswith(raw)):
        return None
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    return np.maximum(np.cumsum(lengths) - extra, 0)


def ends_by_offsets(text: str, pieces: Sequence[bytes], offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Compute token ends from the tokenizer's character offsets.

    Args:
        text: the text.
        pieces: N tokens' bytes, N > 0.
        offsets: N half-open spans of characters, as the `tokenizers` library gives them. They are repaired where they
            are known to be coarse: several tokens inside one character, a dummy prefix, composed characters.

    Returns:
        (N,) int64 byte positions, nondecreasing, the last one the text's length.
    """
    raw = text.encode()
    position = character_positions(raw)
    spans = np.asarray(offsets, np.int64).reshape(-1, 2)
    ends = np.maximum.accumulate(spans[:, 1])
    starts = np.minimum(spans[:, 0], ends)
    _claim_dropped_characters(text, starts, ends)
    byte_end = position[ends]
    shares_character = np.append(starts[1:] < ends[:-1], False)
    before = np.append(False, shares_character[:-1])
    firsts = np.flatnonzero(shares_character & ~before)
    lasts = np.flatnonzero(~shares_character & before)
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        group = slice(first, last + 1)
        span_start, span_end = position[starts[first]], position[ends[last]]
        exact = ends_by_bytes(raw[span_start:span_end], pieces[group])
        if exact is not None:
            byte_end[group] = span_start + exact
        else:
            byte_end[group] = _spread(text, pieces[group], starts[group], ends[group], position)
    byte_end = np.maximum.accumulate(byte_end)
    byte_end[-1] = len(raw)
    return byte_end


def _claim_dropped_characters(text: str, starts: np.ndarray, ends: np.ndarray) -> None:
    """Give characters between two tokens to the earlier one, up to the first white space; changes ``ends``.

    The library gives a composed character only the offsets of its base (``e`` of ``e + U+0301``).
    """
    next_start = np.append(starts[1:], len(text))
    for index in np.flatnonzero(next_start > ends):
        old = new = int(ends[index])
        while new < next_start[index] and not (text[new].isspace() or text[new] == METASPACE):
            new += 1
        while new > old and index >= 0 and ends[index] == old:
            ends[index] = new
            index -= 1  # noqa: PLW2901  (the tokens before that end in the same character)


def _spread(
    text: str, pieces: Sequence[bytes], starts: np.ndarray, ends: np.ndarray, position: np.ndarray
) -> np.ndarray:
    """Spread the ends of tokens that share a character changed by a normaliser evenly *inside* that character.

    Any place strictly inside is right (no text boundary is there), but neither of the character's borders is.
    """
    byte_end = position[ends]
    index = 0
    while index < len(pieces) - 1:
        low, high = position[starts[index + 1]], position[ends[index]]
        if pieces[index] == b" " and not text[starts[index]].isspace():
            byte_end[index] = position[starts[index]]  # only a marker: nothing of the character is read yet
            index += 1
            continue
        stop = index + 1
        while stop < len(pieces) - 1 and (position[starts[stop + 1]], position[ends[stop]]) == (low, high):
            stop += 1
        count = stop - index
        inside = low + (high - low) * np.arange(1, count + 1) // (count + 1)
        byte_end[index:stop] = np.clip(inside, min(low + 1, high - 1), high - 1)
        index = stop
    return byte_end
