"""Cutting a document into segments that fit every tokenizer: the text is cut, token slices are never decoded."""

import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

Measure = Callable[[str], np.ndarray]
"""Text -> (N,) where each of its tokens ends, UTF-8 bytes, nondecreasing: BOS (if used, at 0) and the text's tokens,
without EOS. The last one ends at the text's length unless the tokenizer keeps nothing of the text."""

_WINDOW_CHARACTERS_PER_TOKEN = 4
_LONGEST_CLUSTER = 32


class CutError(ValueError):
    """A document has no cut that fits every tokenizer."""


def cut_document(text: str, measures: Sequence[Measure], max_length: int) -> list[str]:
    """Cut a text into segments of at most ``max_length`` tokens under every tokenizer, an EOS each included.

    A cut falls at the end of a paragraph where one lies in the second half of what fits, else at the end of a line, else
    before white space, else between two characters (not before a combining mark where that can be had). The text is
    tokenized in windows a little longer than a segment, so the cost is linear in its length.

    Args:
        text: not empty.
        measures: one a tokenizer.
        max_length: tokens, at least 2.

    Returns:
        The segments; end to end they are the text.

    Raises:
        CutError: one character has more than ``max_length`` tokens, or a segment would have no token at all.
    """
    segments = []
    start, window = 0, _WINDOW_CHARACTERS_PER_TOKEN * max_length
    while start < len(text):
        size = _next_size(text, start, window, measures, max_length)
        segments.append(text[start : start + size])
        start += size
        window = size + size // 4 + 16
    return segments


def _next_size(text: str, start: int, window: int, measures: Sequence[Measure], max_length: int) -> int:
    """Characters of the segment that begins at ``start``."""
    while True:
        piece = text[start : start + window]
        limit, keeps = _fitting(piece, measures, max_length)
        if limit < len(piece):
            break
        if start + len(piece) == len(text):
            return _refuse_dropped(piece, start, keeps)
        window *= 2
    while limit > 0:
        size = _preferred_cut(piece, limit)
        limit, keeps = _fitting(piece[:size], measures, max_length)
        if limit == size:
            return _refuse_dropped(piece[:size], start, keeps)
    raise CutError(
        f"the text at character {start}, {text[start : start + 8]!r}, has more than {max_length} tokens and cannot be cut "
        "further: raise shard.max_length"
    )


def _fitting(piece: str, measures: Sequence[Measure], max_length: int) -> tuple[int, bool]:
    """How much of a piece has at most ``max_length - 1`` tokens under every tokenizer: EOS has room.

    Returns:
        The number of characters; less than the whole piece is a guess, since the first part alone may be tokenized
        otherwise. And whether every tokenizer keeps some of the text.
    """
    keeps = True
    for measure in measures:
        byte_end = measure(piece)
        keeps &= len(byte_end) > 0 and byte_end[-1] > 0
        if len(byte_end) > max_length - 1:
            fitting = piece.encode()[: byte_end[max_length - 2]].decode("utf-8", errors="ignore")
            piece = fitting if len(fitting) < len(piece) else piece[:-1]
    return len(piece), bool(keeps)


def _refuse_dropped(segment: str, start: int, keeps: bool) -> int:
    """The segment's length; a row without tokens would teach nothing, and has no last token to end it."""
    if not keeps:
        raise CutError(
            f"the {len(segment)} characters from {start} on, {segment[:8]!r}..., have no tokens under one of the run's "
            "tokenizers, which drops all of them"
        )
    return len(segment)


def _preferred_cut(piece: str, limit: int) -> int:
    """Where to cut a piece, 1..limit; ``limit`` is less than its length."""
    half = limit // 2
    for marks in (("\n\n", "\n\r\n"), ("\n",)):
        found = max((piece.rfind(mark, half, limit), len(mark)) for mark in marks)
        if found[0] >= 0:
            return sum(found)
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
