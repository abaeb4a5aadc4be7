import math

import numpy as np
import pytest

from stages.align.teacher import MAX_NLL, compare_shared, distribution_nll, own_nll


def test_nll_is_of_the_gold_token_and_floored():
    ids = np.array([[4, 7], [4, 7], [4, -1], [-1, -1], [4, 7]])
    probs = np.array([[0.5, 0.25], [0.5, 0.25], [1e-6, 0], [0, 0], [0.5, 0.5]])
    found = distribution_nll(ids, probs, np.array([7, 9, 4, 4, -1]))
    np.testing.assert_allclose(found, [math.log(4), MAX_NLL, MAX_NLL, np.nan, np.nan])


def test_own_nll_is_taken_at_the_source_positions():
    gold = np.array([-1.0, -50.0, np.nan], np.float32)
    np.testing.assert_allclose(own_nll(gold, np.array([1, 0, -1, 2])), [MAX_NLL, 1.0, np.nan, np.nan])
    assert np.isnan(own_nll(np.empty(0, np.float32), np.array([-1]))).all()


def test_means_are_of_the_positions_that_all_have():
    found = compare_shared(
        {"a": np.array([1.0, 2.0, np.nan, 4.0]), "b": np.array([3.0, np.nan, np.nan, 5.0]), "c": np.full(4, 2.0)}
    )
    assert found.num_positions == 2
    assert found.means == {"a": 2.5, "b": 4.0, "c": 2.0}
    assert found.coverage == {"a": 0.75, "b": 0.5, "c": 1.0}


def test_nothing_shared_has_no_mean():
    found = compare_shared({"a": np.array([1.0, np.nan]), "b": np.array([np.nan, 1.0])})
    assert found.num_positions == 0
    assert all(math.isnan(mean) for mean in found.means.values())
    empty = compare_shared({"a": np.empty(0)})
    assert empty.num_positions == 0
    assert math.isnan(empty.coverage["a"])


def test_entries_of_other_positions_are_refused():
    with pytest.raises(ValueError, match="'b': 3"):
        compare_shared({"a": np.zeros(2), "b": np.zeros(3)})
    with pytest.raises(ValueError, match="at least one"):
        compare_shared({})
