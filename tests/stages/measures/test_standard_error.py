import math

import numpy as np
import pytest

from stages.measures.standard_error import Estimate, clustered_mean, weighted_mean


def test_documents_of_one_position_have_the_usual_standard_error():
    values = np.random.default_rng(0).normal(3, 1, 50)
    found = clustered_mean(values, np.arange(50)[::-1])
    assert found.mean == pytest.approx(values.mean())
    assert found.error == pytest.approx(values.std(ddof=1) / math.sqrt(50))


def test_repeating_a_documents_positions_adds_no_information():
    values = np.random.default_rng(1).normal(3, 1, 20)
    once = clustered_mean(values, np.arange(20))
    assert clustered_mean(np.repeat(values, 5), np.repeat(np.arange(20), 5)) == pytest.approx(once)


def test_the_error_is_the_spread_over_draws_of_documents():
    """Oracle: the standard deviation of the mean over many samples of documents of different lengths."""
    rng = np.random.default_rng(2)
    means, errors = [], []
    for _ in range(400):
        lengths = rng.integers(1, 40, 60)
        levels = rng.normal(0, 1, 60) + lengths / 40
        documents = np.repeat(np.arange(60), lengths)
        found = clustered_mean(levels[documents] + rng.normal(0, 1, len(documents)), documents)
        means.append(found.mean)
        errors.append(found.error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_a_difference_without_an_error_shows_none():
    assert Estimate(-0.01234, 0.00321).signed() == "-0.0123 ± 0.0032"
    assert Estimate(0.01234, 0.00321).signed(3) == "+0.012 ± 0.003"
    assert Estimate(0.01234, math.nan).signed() == "+0.0123"


def test_weights_count():
    found = weighted_mean(np.array([1.0, 4.0]), np.array([3.0, 1.0]))
    assert found.mean == pytest.approx(1.75)
    assert found.error == pytest.approx(math.sqrt(2 * ((0.75 * 0.75) ** 2 + (0.25 * 2.25) ** 2)))


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_documents_have_no_error(count):
    found = clustered_mean(np.full(3 * count, 2.0), np.zeros(3 * count, int))
    assert math.isnan(found.error)
    assert found.mean == 2 if count else math.isnan(found.mean)
