"""Averages over kinds, against figures computed by hand."""

import math

import numpy as np
import pytest

from stages.measures.kinds import kind_figures


def test_each_kind_weighs_the_same_however_many_documents_it_has() -> None:
    found = kind_figures(np.array([1.0, 2.0, 6.0]), np.array([300.0, 100.0, 10.0]), ["a", "a", "b"])
    assert found.means == {"a": pytest.approx(1.25), "b": 6.0}
    assert found.average.mean == pytest.approx((1.25 + 6.0) / 2)


def test_the_error_is_that_of_a_sample_stratified_by_kind() -> None:
    # Of equal documents: kind a has the mean 2 and the variance of the mean 2 / 2 = 1; kind b 11 and (2 * 9) / 1 / 2 = 9.
    figures, kinds = np.array([1.0, 3.0, 8.0, 14.0]), ["a", "a", "b", "b"]
    found = kind_figures(figures, np.full(4, 50.0), kinds)
    assert found.average.mean == pytest.approx(6.5)
    assert found.average.error == pytest.approx(math.sqrt(1 + 9) / 2)


def test_differences_between_kinds_are_no_error() -> None:
    found = kind_figures(np.array([1.0, 1.0, 9.0, 9.0]), np.full(4, 7.0), ["a", "a", "b", "b"])
    assert found.average == pytest.approx((5.0, 0.0))


def test_a_kind_of_one_document_is_taken_to_vary_like_the_others() -> None:
    # Variances between documents: 2 in a, 18 in b, so 10 in c, whose mean is that of its one document.
    figures, kinds = np.array([1.0, 3.0, 8.0, 14.0, 5.0]), ["a", "a", "b", "b", "c"]
    found = kind_figures(figures, np.full(5, 50.0), kinds)
    assert found.average.error == pytest.approx(math.sqrt(1 + 9 + 10) / 3)


def test_there_is_no_error_where_no_kind_has_two_documents() -> None:
    found = kind_figures(np.array([1.0, 2.0]), np.array([5.0, 5.0]), ["a", "b"])
    assert found.average.mean == pytest.approx(1.5)
    assert math.isnan(found.average.error)
    nothing = kind_figures(np.empty(0), np.empty(0), [])
    assert nothing.means == {}
    assert math.isnan(nothing.average.mean)


def test_a_kind_is_won_where_its_mean_is_below_zero() -> None:
    found = kind_figures(np.array([-3.0, 1.0, 0.0, 2.0]), np.array([10.0, 10.0, 5.0, 5.0]), ["a", "a", "b", "c"])
    assert found.means == {"a": -1.0, "b": 0.0, "c": 2.0}
    assert found.num_won == 1, "a tie is not won"
