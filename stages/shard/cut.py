"""Cut a document into segments that fit every tokenizer: the text is cut, token slices are never decoded."""

import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from stages.models.tokenizer import Measured

Measure = Callable[[str], Measured]
"""Function that tokenizes a text in which no document ends."""


class Cut(NamedTuple):
    """A document in segments.

    Attributes:
        segments: end to end they are the text.
        num_tokens: one per tokenizer: tokens of all segments, including the BOS of each, without EOS.
    """

    segments: list[str]
    num_tokens: list[int]


class _Fit(NamedTuple):
    """Size of the part of a piece of text that fits, and its tokens under each tokenizer if all of it does."""

    size: int
    num_tokens: list[int]
    keeps_text: bool


_WINDOW_CHARACTERS_PER_TOKEN = 4
_LONGEST_CLUSTER = 32


class CutError(ValueError):
    """A document has no cut that fits every tokenizer."""


def cut_document(text: str, measures: Sequence[Measure], max_length: int) -> Cut:
    """Cut a text into segments of at most ``max_length`` tokens under every tokenizer, an EOS each included.

    A cut falls at the end of a paragraph where one lies in the second half of what fits, else at the end of a line, else
    before white space, else between two characters (not before a combining mark where that can be had). The text is
    tokenized in windows a little longer than a segment, and each segment once by itself: the cost is linear in the length.

    Args:
        text: not empty.
        measures: one per tokenizer.
        max_length: tokens, at least 2.

    Raises:
        CutError: one character has more than ``max_length`` tokens, or a segment would have no token at all.
    """
    cut = Cut([], [0] * len(measures))
    start, window = 0, _WINDOW_CHARACTERS_PER_TOKEN * max_length
    while start < len(text):
        fit = _next_segment(text, start, window, measures, max_length)
        segment = text[start : start + fit.size]
        if not fit.keeps_text:  # a row without tokens would teach nothing, and has no last token to end it
            raise CutError(
                f"the {len(segment)} characters from {start} on, {segment[:8]!r}..., have no tokens under one of the run's "
                "tokenizers, which drops all of them"
            )
        cut.segments.append(segment)
        cut.num_tokens[:] = np.add(cut.num_tokens, fit.num_tokens).tolist()
        start += fit.size
        window = fit.size + fit.size // 4 + 16
    return cut


def _next_segment(text: str, start: int, window: int, measures: Sequence[Measure], max_length: int) -> _Fit:
    """Find the segment that begins at ``start``; all of it fits."""
    while True:
        piece = text[start : start + window]
        fit = _fitting(piece, measures, max_length)
        if fit.size < len(piece):
            break
        if start + len(piece) == len(text):
            return fit
        window *= 2
    while fit.size > 0:
        size = _preferred_cut(piece, fit.size)
        fit = _fitting(piece[:size], measures, max_length)
        if fit.size == size:
            return fit
    raise CutError(
        f"the text at character {start}, {text[start : start + 8]!r}, has more than {max_length} tokens and cannot be cut "
        "further: raise shard.max_length"
    )


def _fitting(piece: str, measures: Sequence[Measure], max_length: int) -> _Fit:
    """Measure how much of a piece has at most ``max_length - 1`` tokens under every tokenizer: EOS has room.

    A size below the whole piece is a guess, since the first part may be tokenized differently by itself.
    """
    measurements = []
    for measure in measures:
        measured = measure(piece)
        measurements.append(measured)
        if measured.num_tokens > max_length - 1:
            fitting = piece.encode()[: measured.byte_end()[max_length - 2]].decode("utf-8", errors="ignore")
            piece = fitting if len(fitting) < len(piece) else piece[:-1]
    return _Fit(
        len(piece),
        [measurement.num_tokens for measurement in measurements],
        all(measurement.keeps_text for measurement in measurements),
    )


def _preferred_cut(piece: str, limit: int) -> int:
    """Choose where to cut a piece, 1..limit; ``limit`` is less than its length."""
    half = limit // 2
    for marks in (("\n\n", "\n\r\n"), ("\n",)):
        last_mark = max((piece.rfind(mark, half, limit), len(mark)) for mark in marks)
        if last_mark[0] >= 0:
            return sum(last_mark)
    for cut in range(limit, half, -1):
        if piece[cut].isspace() and not piece[cut - 1].isspace():
            return cut
    for cut in range(limit, max(0, limit - _LONGEST_CLUSTER), -1):
        if not _joins(piece[cut - 1], piece[cut]):
            return cut
    return limit


def _joins(before: str, after: str) -> bool:
    """Do two characters belong to one that is seen (a base and its accents, an emoji sequence, CR LF)?"""
    return (
        unicodedata.category(after).startswith("M")
        or "\u200d" in (before, after)
        or "\U0001f3fb" <= after <= "\U0001f3ff"
        or (before == "\r" and after == "\n")
    )
