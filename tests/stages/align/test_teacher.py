import math

import numpy as np
import pytest

from stages.align.teacher import compare_shared, mixture_nll, top_k_nll
from stages.measures.teacher import MAX_NLL


def test_a_window_is_narrowed_before_it_is_rescaled():
    ids, probs = np.array([[5, 6, 7], [5, -1, -1], [-1, -1, -1]]), np.array([[0.5, 0.2, 0.1], [0.4, 0, 0], [0, 0, 0]])
    gold = np.array([6, 5, 5])
    np.testing.assert_allclose(top_k_nll(ids, probs, gold, top_k=3, top_p=None), [-math.log(0.25), 0, np.nan])
    np.testing.assert_allclose(top_k_nll(ids, probs, gold, top_k=2, top_p=None), [-math.log(2 / 7), 0, np.nan])
    np.testing.assert_allclose(top_k_nll(ids, probs, gold, top_k=3, top_p=0.45), [MAX_NLL, 0, np.nan])


def compare(nll, documents=None, baseline="a"):
    size = len(next(iter(nll.values()), []))
    return compare_shared(nll, documents=np.arange(size) if documents is None else documents, baseline=baseline)


def test_means_are_of_the_positions_that_all_have():
    found = compare(
        {"a": np.array([1.0, 2.0, np.nan, 4.0]), "b": np.array([3.0, np.nan, np.nan, 5.0]), "c": np.full(4, 2.0)}
    )
    assert (found.num_positions, found.num_documents) == (2, 2)
    assert {name: entry.nll.mean for name, entry in found.entries.items()} == {"a": 2.5, "b": 4.0, "c": 2.0}
    assert {name: entry.coverage for name, entry in found.entries.items()} == {"a": 0.75, "b": 0.5, "c": 1.0}
    assert {name: entry.num_positions for name, entry in found.entries.items()} == {"a": 3, "b": 2, "c": 4}
    assert found.entries["c"].difference.mean == -0.5
    assert found.entries["c"].own_difference.mean == pytest.approx(-1 / 3)  # where a and c are, b or not


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    level = rng.normal(3, 1, 30)
    change = rng.normal(-0.1, 0.01, 30)
    found = compare({"a": level, "b": level + change})
    assert found.entries["b"].difference == pytest.approx((change.mean(), change.std(ddof=1) / math.sqrt(30)))
    assert found.entries["b"].nll.error > 10 * found.entries["b"].difference.error
    assert found.entries["a"].difference == (0, 0)


def test_the_best_mixture_is_that_of_a_fine_search():
    rng = np.random.default_rng(1)
    nll = [rng.gamma(2, 1, 500) for _ in range(2)]
    share, found = mixture_nll(*nll)
    fine = [-np.log((1 - x) * np.exp(-nll[0]) + x * np.exp(-nll[1])).mean() for x in np.linspace(0, 1, 1001)]
    assert found.mean() == pytest.approx(min(fine), abs=1e-4)
    assert share == pytest.approx(np.argmin(fine) / 1000, abs=0.02)
    assert found.mean() < min(part.mean() for part in nll)


def test_leaning_to_the_baseline_lowers_the_nll_and_adds_nothing():
    rng = np.random.default_rng(2)
    good, poor = rng.gamma(2, 1, 400), rng.gamma(4, 1, 400)
    leaning = -np.log(0.5 * np.exp(-good) + 0.5 * np.exp(-poor))
    entries = compare({"a": good, "poor": poor, "leaning": leaning}).entries
    assert entries["leaning"].nll.mean < entries["poor"].nll.mean - 0.3
    assert entries["leaning"].mixed_difference.mean == pytest.approx(entries["poor"].mixed_difference.mean, abs=1e-3)
    assert entries["poor"].mixed_difference.mean < 0
    assert entries["a"].mixed_difference == pytest.approx((0, 0))


def test_errors_are_over_documents():
    values = np.array([1.0, 1.0, 1.0, 3.0, 3.0, 3.0])
    together = compare({"a": values}, documents=np.array([7, 7, 7, 9, 9, 9]))
    assert together.num_documents == 2
    assert together.entries["a"].nll.error == pytest.approx(1.0)
    assert compare({"a": values}).entries["a"].nll.error < 0.5


def test_nothing_shared_has_no_mean():
    found = compare({"a": np.array([1.0, np.nan]), "b": np.array([np.nan, 1.0])})
    assert (found.num_positions, found.num_documents) == (0, 0)
    assert all(math.isnan(entry.nll.mean) for entry in found.entries.values())
    empty = compare({"a": np.empty(0)})
    assert empty.num_positions == 0
    assert math.isnan(empty.entries["a"].coverage)


def test_entries_of_other_positions_are_refused():
    with pytest.raises(ValueError, match="'b': 3"):
        compare({"a": np.zeros(2), "b": np.zeros(3)})
    with pytest.raises(ValueError, match="'documents': 3"):
        compare({"a": np.zeros(2)}, documents=np.zeros(3))
    with pytest.raises(ValueError, match="at least one"):
        compare({})
    with pytest.raises(ValueError, match="no entry 'z'"):
        compare({"a": np.zeros(2)}, baseline="z")
