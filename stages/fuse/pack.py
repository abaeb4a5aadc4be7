"""Segments laid end to end and cut into training blocks."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Where each segment's tokens lie in the blocks; P pieces, in the order of the text.

    Attributes:
        num_blocks: blocks; all but the last are full.
        block: (P,) the block a piece lies in, nondecreasing.
        start: (P,) the piece's first position in its block.
        segment: (P,) the segment it belongs to.
        offset: (P,) its first token in that segment.
        length: (P,) its tokens, at least 1.
    """

    num_blocks: int
    block: np.ndarray
    start: np.ndarray
    segment: np.ndarray
    offset: np.ndarray
    length: np.ndarray


def pack(lengths: np.ndarray, *, max_length: int) -> Packing:
    """Cut the concatenation of all segments into blocks of ``max_length`` tokens; the last one is as long as it comes.

    Args:
        lengths: (S,) tokens of each segment; a segment without tokens has no piece.
        max_length: tokens of a block, at least 1.

    Raises:
        ValueError: ``max_length`` is below 1.
    """
    if max_length < 1:
        raise ValueError(f"a block of max_length = {max_length} tokens holds nothing: expected at least 1")
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    segment_starts = ends - lengths
    borders = np.arange(0, total, max_length, dtype=np.int64)
    starts = np.union1d(segment_starts[np.asarray(lengths) > 0], borders)
    segment = np.searchsorted(ends, starts, side="right")
    return Packing(
        num_blocks=len(borders),
        block=starts // max_length,
        start=starts % max_length,
        segment=segment,
        offset=starts - segment_starts[segment],
        length=np.diff(np.append(starts, total)),
    )
