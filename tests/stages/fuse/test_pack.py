import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.fuse.pack import pack


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 16))
def test_every_token_is_in_exactly_one_block_in_order(lengths, max_length):
    packing = pack(np.array(lengths, np.int64), max_length=max_length, packing="cut")
    placed = [
        (segment, offset + i)
        for segment, offset, length in zip(packing.segment, packing.offset, packing.length, strict=True)
        for i in range(length)
    ]
    assert placed == [(segment, token) for segment, length in enumerate(lengths) for token in range(length)]


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 16))
def test_blocks_are_full_but_the_last_and_pieces_touch(lengths, max_length):
    packing = pack(np.array(lengths, np.int64), max_length=max_length, packing="cut")
    sizes = np.bincount(packing.block, packing.length, minlength=packing.num_blocks).astype(int).tolist()
    assert sizes[:-1] == [max_length] * max(0, packing.num_blocks - 1)
    assert sum(sizes) == sum(lengths)
    for block in range(packing.num_blocks):
        inside = packing.block == block
        starts = np.append(0, np.cumsum(packing.length[inside]))
        assert packing.start[inside].tolist() == starts[:-1].tolist()
    assert (packing.length > 0).all()


def test_a_segment_longer_than_a_block_is_cut_and_no_token_is_dropped():
    packing = pack(np.array([2, 5]), max_length=3, packing="cut")
    assert packing.num_blocks == 3
    assert packing.block.tolist() == [0, 0, 1, 2]
    assert packing.start.tolist() == [0, 2, 0, 0]
    assert packing.segment.tolist() == [0, 1, 1, 1]
    assert packing.offset.tolist() == [0, 0, 1, 4]
    assert packing.length.tolist() == [2, 1, 3, 1]


def test_blocks_of_no_length_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        pack(np.array([3]), max_length=0, packing="whole")


SIZES = st.lists(st.integers(0, 16), max_size=40)


@given(SIZES, st.integers(16, 40))
def test_whole_segments_are_all_there_once_and_never_cut(lengths, max_length):
    packing = pack(np.array(lengths, np.int64), max_length=max_length, packing="whole")
    assert sorted(packing.segment.tolist()) == [segment for segment, length in enumerate(lengths) if length]
    assert packing.length.tolist() == [lengths[segment] for segment in packing.segment]
    assert not packing.offset.any()


@given(SIZES, st.integers(16, 40))
def test_blocks_of_whole_segments_are_not_overfull_and_their_pieces_touch_in_order(lengths, max_length):
    packing = pack(np.array(lengths, np.int64), max_length=max_length, packing="whole")
    assert sorted(set(packing.block.tolist())) == list(range(packing.num_blocks))
    firsts = []
    for block in range(packing.num_blocks):
        inside = packing.block == block
        ends = np.cumsum(packing.length[inside])
        assert ends[-1] <= max_length
        assert packing.start[inside].tolist() == [0, *ends[:-1].tolist()]
        assert (np.diff(packing.segment[inside]) > 0).all()
        firsts.append(int(packing.segment[inside][0]))
    assert firsts == sorted(firsts)


@given(SIZES, st.integers(16, 40))
def test_packing_is_a_function_of_the_lengths(lengths, max_length):
    one, other = (pack(np.array(lengths, np.int64), max_length=max_length, packing="whole") for _ in range(2))
    assert one.segment.tolist() == other.segment.tolist()
    assert one.block.tolist() == other.block.tolist()


@given(SIZES, st.integers(16, 40))
def test_no_two_blocks_of_best_fit_could_be_one(lengths, max_length):
    """Any-fit: a block is only begun when a segment fits none, so at most one block is half empty or more."""
    packing = pack(np.array(lengths, np.int64), max_length=max_length, packing="whole")
    sizes = np.bincount(packing.block, packing.length, minlength=packing.num_blocks)
    assert (sizes <= max_length / 2).sum() <= 1


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(30, 40), st.sampled_from(["whole", "cut"]))
def test_tokens_of_blocks_are_those_of_their_pieces(lengths, max_length, packing):
    found = pack(np.array(lengths, np.int64), max_length=max_length, packing=packing)
    starts = np.cumsum(lengths) - lengths if lengths else np.empty(0, np.int64)
    expected = [
        int(starts[segment]) + int(offset) + i
        for segment, offset, length in zip(found.segment, found.offset, found.length, strict=True)
        for i in range(length)
    ]
    assert found.tokens(np.array(lengths, np.int64)).tolist() == expected


def test_a_segment_that_is_longer_than_a_block_is_refused_where_it_must_stay_whole():
    with pytest.raises(ValueError, match=r"segment of 5 tokens does not fit a block of 4 whole: set fuse\.max_length"):
        pack(np.array([2, 5]), max_length=4, packing="whole")


def test_blocks_of_minipile_like_segments_are_nearly_full():
    """Lengths as of web text cut at 2,048 tokens: most documents short, a long tail cut into full segments and rests."""
    rng = np.random.default_rng(0)
    lengths = []
    for length in np.exp(rng.normal(6.3, 1.1, 500)).astype(int) + 1:
        full, rest = divmod(int(length), 2048)
        lengths += [2048] * full + [rest] * bool(rest)
    packing = pack(np.array(lengths), max_length=2048, packing="whole")
    assert sum(lengths) / (packing.num_blocks * 2048) > 0.97
