"""Segments packed into training blocks: whole, or end to end and cut."""

import bisect
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Layout of each segment's tokens in the blocks; P pieces, block by block.

    Attributes:
        num_blocks: number of blocks.
        block: (P,) the block of each piece, nondecreasing.
        start: (P,) the piece's first position in its block.
        segment: (P,) the segment it belongs to; ascending within a block.
        offset: (P,) its first token in that segment.
        length: (P,) its tokens, at least 1.
    """

    num_blocks: int
    block: np.ndarray
    start: np.ndarray
    segment: np.ndarray
    offset: np.ndarray
    length: np.ndarray

    def pieces_of(self, segment: int) -> np.ndarray:
        """Return the pieces of a segment, in the order of its text."""
        pieces = np.flatnonzero(self.segment == segment)
        return pieces[np.argsort(self.offset[pieces], kind="stable")]

    def tokens(self, segment_lengths: np.ndarray) -> np.ndarray:
        """Return, for every position of all blocks end to end, the token's place among all segments end to end."""
        starts = np.cumsum(segment_lengths) - segment_lengths
        first = starts[self.segment] + self.offset
        piece_end = np.cumsum(self.length)
        return np.arange(int(piece_end[-1]) if len(piece_end) else 0) + np.repeat(
            first - (piece_end - self.length), self.length
        )


def pack(lengths: np.ndarray, *, max_length: int, packing: Literal["whole", "cut"]) -> Packing:
    """Pack segments into blocks of at most ``max_length`` tokens.

    Args:
        lengths: (S,) tokens of each segment; a segment without tokens has no piece.
        max_length: tokens of a block, at least 1.
        packing: ``"whole"``: no segment is cut; best fit decreasing (``pack_whole``). ``"cut"``: the concatenation of all
            segments is cut (``pack_cut``).

    Raises:
        ValueError: ``max_length`` is below 1, or a segment that must stay whole is longer.
    """
    if max_length < 1:
        raise ValueError(f"a block of max_length = {max_length} tokens holds nothing: expected at least 1")
    return (pack_whole if packing == "whole" else pack_cut)(np.asarray(lengths, np.int64), max_length)


def pack_whole(lengths: np.ndarray, max_length: int) -> Packing:
    """Pack whole segments by best fit decreasing: each, from the longest, into the block it leaves the least room in.

    Of equally long segments the earlier one comes first, of equally full blocks the earlier one is taken, so the result
    depends only on the lengths. Blocks are in the order of their first segments, and so are the pieces of a block.

    Args:
        lengths: (S,) tokens of each segment.
        max_length: tokens of a block.

    Raises:
        ValueError: a segment is longer than a block.

    Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling".
    """
    if len(lengths) and lengths.max() > max_length:
        raise ValueError(
            f"a segment of {int(lengths.max())} tokens does not fit a block of {max_length} whole: set fuse.max_length to at "
            'least shard.max_length, or fuse.packing = "cut"'
        )
    members: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, block), sorted: the tightest block that fits is one search away
    for segment in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[segment])
        if not length:
            continue
        place = bisect.bisect_left(room, (length, -1))
        if place < len(room):
            left, block = room.pop(place)
        else:
            left, block = max_length, len(members)
            members.append([])
        members[block].append(segment)
        bisect.insort(room, (left - length, block))
    blocks = sorted(sorted(members_of) for members_of in members)
    order = np.array([segment for members_of in blocks for segment in members_of], np.int64)
    sizes = np.array([len(members_of) for members_of in blocks], np.int64)
    piece_lengths = lengths[order]
    ends = np.cumsum(piece_lengths)
    block_starts = np.append(0, ends)[np.cumsum(sizes) - sizes]
    return Packing(
        num_blocks=len(blocks),
        block=np.repeat(np.arange(len(blocks)), sizes),
        start=ends - piece_lengths - np.repeat(block_starts, sizes),
        segment=order,
        offset=np.zeros(len(order), np.int64),
        length=piece_lengths,
    )


def pack_cut(lengths: np.ndarray, max_length: int) -> Packing:
    """Cut the concatenation of all segments into blocks of ``max_length`` tokens; the last one may be shorter.

    A block may begin inside a segment: what is predicted there has a context that the block does not hold.

    Args:
        lengths: (S,) tokens of each segment.
        max_length: tokens of a block.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    segment_starts = ends - lengths
    borders = np.arange(0, total, max_length, dtype=np.int64)
    starts = np.union1d(segment_starts[lengths > 0], borders)
    segment = np.searchsorted(ends, starts, side="right")
    return Packing(
        num_blocks=len(borders),
        block=starts // max_length,
        start=starts % max_length,
        segment=segment,
        offset=starts - segment_starts[segment],
        length=np.diff(np.append(starts, total)),
    )
