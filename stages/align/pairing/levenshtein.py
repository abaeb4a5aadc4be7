"""Levenshtein distances between the texts of tokens.

Texts may hold lone surrogates: a byte that is not part of a whole UTF-8 character is one such code point
(``surrogateescape``), which is compared like any other character.
"""

from collections.abc import Sequence
from itertools import compress
from typing import Final

import numpy as np
from numba import njit
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

_WORD: Final = 16
"""Bits of the kernel's words, and characters of the longest column text that it takes: nearly all tokens are shorter."""
_ONE, _TWO, _FOUR, _EIGHT = (np.uint16(2**exponent) for exponent in range(4))
_PAIRS, _QUADS, _BYTES, _COUNT = (np.uint16(mask) for mask in (0x5555, 0x3333, 0x0F0F, 0x1F))


def levenshtein_matrix(rows: Sequence[str], columns: Sequence[str]) -> np.ndarray:
    """Compute the distance of every row text to every column text.

    Args:
        rows: R texts.
        columns: C texts.

    Returns:
        (R, C), the narrowest of uint8, uint16 and int32 that holds the longest text's length: a distance is never longer.
    """
    row_lengths, column_lengths = (np.array([len(text) for text in texts], np.int64) for texts in (rows, columns))
    longest = max(row_lengths.max(initial=0), column_lengths.max(initial=0))
    dtype = np.uint8 if longest < 2**8 else np.uint16 if longest < 2**16 else np.int32
    if not rows or not columns:
        return np.zeros((len(rows), len(columns)), dtype)
    distances = np.empty((len(rows), len(columns)), dtype)
    if column_lengths.max() <= _WORD:
        _fill_distances(_codes(rows), row_lengths, _codes(columns), column_lengths, distances)
        return distances
    is_long = column_lengths > _WORD
    distances[:, ~is_long] = levenshtein_matrix(rows, list(compress(columns, ~is_long)))
    distances[:, is_long] = cdist(rows, list(compress(columns, is_long)), scorer=Levenshtein.distance, dtype=dtype)
    return distances


def _codes(texts: Sequence[str]) -> np.ndarray:
    """Return the code points of all texts, end to end."""
    return np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)


@njit(cache=True)
def _fill_distances(
    row_codes: np.ndarray,
    row_lengths: np.ndarray,
    column_codes: np.ndarray,
    column_lengths: np.ndarray,
    distances: np.ndarray,
) -> None:
    """Fill in the distances of every row text to every column text of at most 16 characters.

    Each column is a vector lane.

    Bit i of a column's words stands for its character i: in ``rise`` (``fall``) it is set where the distance from what was
    read of the row's text to the column's first i + 1 characters is one more (less) than to its first i. Reading a
    character is a dozen operations on these words, whatever the column's length, and the distance to the whole column is
    the number of characters read plus all rises less all falls.

    Source: Myers 1999; in the form of Hyyro 2003.
    """
    matches, numbers = _matches(column_codes, column_lengths)
    num_columns = len(column_lengths)
    rise, fall = np.empty(num_columns, np.uint16), np.empty(num_columns, np.uint16)
    used = np.empty(num_columns, np.uint16)
    for column in range(num_columns):
        used[column] = (1 << column_lengths[column]) - 1
    place = 0
    for row in range(len(row_lengths)):
        for column in range(num_columns):
            rise[column] = 0xFFFF
            fall[column] = 0
        for _ in range(row_lengths[row]):
            code = row_codes[place]
            place += 1
            _read(matches[numbers[code] if code < len(numbers) else 0], rise, fall)
        # The whole column's distance: characters read, plus all rises, minus all falls.
        line, length = distances[row], row_lengths[row]
        for column in range(num_columns):
            rises = _count_bits(np.uint16(rise[column] & used[column]))
            falls = _count_bits(np.uint16(fall[column] & used[column]))
            line[column] = length + np.int64(rises) - np.int64(falls)


@njit(cache=True)
def _matches(codes: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tabulate where each character occurs in each text, one bit per place.

    Returns:
        (characters, texts) uint16, and the row of each code in it. Row 0 is for characters that occur in no text.

    Number 0 is that of a character which is in no text.
    """
    numbers = np.zeros(codes.max() + 1 if len(codes) else 1, np.int32)
    num_characters = 1
    for code in codes:
        if numbers[code] == 0:
            numbers[code] = num_characters
            num_characters += 1
    matches = np.zeros((num_characters, len(lengths)), np.uint16)
    place = 0
    for text in range(len(lengths)):
        for i in range(lengths[text]):
            matches[numbers[codes[place]], text] |= np.uint16(1 << i)
            place += 1
    return matches, numbers


@njit(cache=True)
def _read(match: np.ndarray, rise: np.ndarray, fall: np.ndarray) -> None:
    """Read one character of a row's text; ``match`` has its places in every column's."""
    for column in range(len(match)):
        same, up, down = match[column], rise[column], fall[column]
        # Bits where the distance does not exceed that of both texts without their last characters.
        level = np.uint16((np.uint16(np.uint16(same & up) + up) ^ up) | same | down)
        grows = np.uint16(np.uint16(down | np.uint16(~np.uint16(level | up))) << _ONE) | _ONE
        shrinks = np.uint16(np.uint16(level & up) << _ONE)
        rise[column] = np.uint16(shrinks | np.uint16(~np.uint16(level | grows)))
        fall[column] = np.uint16(grows & level)


@njit(cache=True)
def _count_bits(word: np.uint16) -> np.uint16:
    """Count the bits that are set in a uint16, in steps that run in vector lanes."""
    pairs = np.uint16(word - np.uint16(np.uint16(word >> _ONE) & _PAIRS))
    quads = np.uint16(np.uint16(pairs & _QUADS) + np.uint16(np.uint16(pairs >> _TWO) & _QUADS))
    octets = np.uint16(np.uint16(quads + np.uint16(quads >> _FOUR)) & _BYTES)
    return np.uint16(np.uint16(octets + np.uint16(octets >> _EIGHT)) & _COUNT)
