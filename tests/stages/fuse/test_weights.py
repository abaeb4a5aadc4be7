import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stages.contract.columns import PAD_ID, SparseRows
from stages.fuse.mix import Candidate
from stages.fuse.weights import (
    block_cross_entropy,
    candidate_weights,
    gold_probability,
    token_cross_entropy,
    win_shares,
)
from stages.measures.teacher import TEACHER_FLOOR


def test_min_ce_takes_the_lowest_cross_entropy():
    weights = candidate_weights(np.array([[3.0, 1.0, 2.0]]), np.ones((1, 3), bool), function="min-ce")
    assert weights.tolist() == [[0, 1, 0]]


def test_min_ce_takes_the_first_of_tied_candidates():
    weights = candidate_weights(np.array([[2.0, 1.0, 1.0]]), np.ones((1, 3), bool), function="min-ce")
    assert weights.tolist() == [[0, 1, 0]]


def test_avg_ce_weights_are_proportional_to_exp_of_minus_ce():
    ce = np.array([[0.5, 1.5, 2.5]])
    weights = candidate_weights(ce, np.ones((1, 3), bool), function="avg-ce")
    np.testing.assert_allclose(weights, np.exp(-ce) / np.exp(-ce).sum())


@pytest.mark.parametrize("function", ["min-ce", "avg-ce"])
def test_candidates_without_a_distribution_do_not_compete(function):
    ce = np.array([[1.0, 2.0], [1.0, 2.0]])
    present = np.array([[False, True], [False, False]])
    assert candidate_weights(ce, present, function=function).tolist() == [[0, 1], [0, 0]]


def test_unknown_cross_entropy_ranks_last_and_ties_with_other_unknown_ones():
    ce = np.array([[np.nan, 900.0], [np.nan, np.nan]])
    present = np.ones((2, 2), bool)
    assert candidate_weights(ce, present, function="min-ce").tolist() == [[0, 1], [1, 0]]
    assert candidate_weights(ce, present, function="avg-ce").tolist() == [[0, 1], [0.5, 0.5]]


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="both are"):
        candidate_weights(np.zeros((2, 2)), np.ones((2, 3), bool), function="min-ce")


@given(
    hnp.arrays(np.float64, (5, 3), elements=st.floats(0, 2000) | st.just(np.nan)),
    hnp.arrays(bool, (5, 3)),
    st.sampled_from(["min-ce", "avg-ce"]),
)
@settings(max_examples=60)
def test_weights_sum_to_one_exactly_where_a_candidate_is_present(ce, present, function):
    weights = candidate_weights(ce, present, function=function)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), present.any(axis=1))
    assert (weights[~present] == 0).all()


def rows(*dicts: dict[int, float]) -> SparseRows:
    width = max([1, *map(len, dicts)])
    ids, logprobs = np.full((len(dicts), width), PAD_ID, np.int32), np.full((len(dicts), width), -np.inf, np.float32)
    for row, entries in enumerate(dicts):
        ids[row, : len(entries)] = list(entries)
        logprobs[row, : len(entries)] = np.log(list(entries.values()))
    return SparseRows(ids, logprobs)


def test_gold_probability_reads_the_row_and_floors_what_it_does_not_say():
    found = gold_probability(rows({7: 0.5, 9: 0.25}, {7: 0.5}, {7: 1e-6}, {}), np.array([9, 9, 7, PAD_ID]))
    np.testing.assert_allclose(found, [0.25, TEACHER_FLOOR, TEACHER_FLOOR, TEACHER_FLOOR], rtol=1e-6)


def test_token_cross_entropy_judges_each_candidate_by_its_own_row():
    candidates = [Candidate(part, np.zeros(2)) for part in (rows({1: 0.5}, {2: 0.25}), rows({1: 0.125}, {3: 1.0}))]
    judged = token_cross_entropy(candidates, np.array([1, 2]))
    np.testing.assert_allclose(judged, -np.log([[0.5, 0.125], [0.25, TEACHER_FLOOR]]), rtol=1e-6)


def test_block_cross_entropy_is_the_mean_over_its_pieces_known_ones():
    segment_ce = np.array([[1.0, np.nan], [3.0, 5.0], [7.0, np.nan]])
    found = block_cross_entropy(segment_ce, segment=np.array([0, 1, 1, 2]), block=np.array([0, 0, 1, 2]))
    np.testing.assert_array_equal(found, [[2.0, 5.0], [3.0, 5.0], [7.0, np.nan]])


def test_tied_candidates_share_a_win():
    ce = np.array([[1.0, 1.0, 2.0], [np.nan, np.nan, np.nan], [3.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    present = np.array([[True, True, True], [True, False, True], [True, True, False], [False, False, False]])
    assert win_shares(ce, present).tolist() == [[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 1, 0], [0, 0, 0]]


@given(
    hnp.arrays(np.float64, (5, 3), elements=st.sampled_from([0.0, 1.0, 2.5]) | st.floats(0, 2000) | st.just(np.nan)),
    hnp.arrays(bool, (5, 3)),
)
@settings(max_examples=60)
def test_the_chosen_candidate_is_among_the_winners(ce, present):
    shares, weights = win_shares(ce, present), candidate_weights(ce, present, function="min-ce")
    np.testing.assert_allclose(shares.sum(axis=1), present.any(axis=1))
    assert (shares[weights > 0] > 0).all()
    order = [2, 0, 1]
    np.testing.assert_array_equal(win_shares(ce[:, order], present[:, order]), shares[:, order])
