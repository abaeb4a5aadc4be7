import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.fuse.pack import pack


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 16))
def test_every_token_is_in_exactly_one_block_in_order(lengths, max_length):
    packing = pack(np.array(lengths, np.int64), max_length=max_length)
    placed = [
        (segment, offset + i)
        for segment, offset, length in zip(packing.segment, packing.offset, packing.length, strict=True)
        for i in range(length)
    ]
    assert placed == [(segment, token) for segment, length in enumerate(lengths) for token in range(length)]


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 16))
def test_blocks_are_full_but_the_last_and_pieces_touch(lengths, max_length):
    packing = pack(np.array(lengths, np.int64), max_length=max_length)
    sizes = np.bincount(packing.block, packing.length, minlength=packing.num_blocks).astype(int).tolist()
    assert sizes[:-1] == [max_length] * max(0, packing.num_blocks - 1)
    assert sum(sizes) == sum(lengths)
    for block in range(packing.num_blocks):
        inside = packing.block == block
        starts = np.append(0, np.cumsum(packing.length[inside]))
        assert packing.start[inside].tolist() == starts[:-1].tolist()
    assert (packing.length > 0).all()


def test_a_segment_longer_than_a_block_is_cut_and_no_token_is_dropped():
    packing = pack(np.array([2, 5]), max_length=3)
    assert packing.num_blocks == 3
    assert packing.block.tolist() == [0, 0, 1, 2]
    assert packing.start.tolist() == [0, 2, 0, 0]
    assert packing.segment.tolist() == [0, 1, 1, 1]
    assert packing.offset.tolist() == [0, 0, 1, 4]
    assert packing.length.tolist() == [2, 1, 3, 1]


def test_blocks_of_no_length_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        pack(np.array([3]), max_length=0)
