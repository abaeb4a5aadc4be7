"""Figures of suites and their standard errors, against other ways to compute them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from pipeline.evaluation.suites.figures import difference, figure

RANDOM = np.random.default_rng(5)


def test_mean_of_one_task_has_the_usual_standard_error() -> None:
    values = RANDOM.integers(0, 2, 50).astype(float)
    found = figure([values], "mean")
    assert found.mean == pytest.approx(values.mean())
    assert found.error == pytest.approx(stats.sem(values))


def test_each_document_weighs_the_same_and_sub_tasks_are_strata() -> None:
    sizes, rates = (10, 40), (0.9, 0.2)
    strata = [RANDOM.binomial(1, rate, size).astype(float) for size, rate in zip(sizes, rates, strict=True)]
    found = figure(strata, "mean")
    assert found.mean == pytest.approx(np.concatenate(strata).mean())
    by_hand = sum((size / 50 * stats.sem(values)) ** 2 for size, values in zip(sizes, strata, strict=True))
    assert found.error == pytest.approx(math.sqrt(by_hand))


def test_perplexity_and_its_error_agree_with_the_bootstrap() -> None:
    values = RANDOM.normal(-4, 1.0, 400)
    found = figure([values], "perplexity")
    assert found.mean == pytest.approx(math.exp(-values.mean()))
    resampled = np.exp(-RANDOM.choice(values, (4000, 400)).mean(axis=1))
    assert found.error == pytest.approx(resampled.std(), rel=0.1)


def test_paired_difference_of_means_is_the_mean_difference() -> None:
    before, after = RANDOM.random(30), RANDOM.random(30)
    found = difference([after], [before], "mean")
    assert found.mean == pytest.approx((after - before).mean())
    assert found.error == pytest.approx(stats.sem(after - before))


def test_paired_difference_of_perplexities_agrees_with_the_bootstrap() -> None:
    before = RANDOM.normal(-4, 1.0, 400)
    after = before + RANDOM.normal(0.1, 0.2, 400)
    found = difference([after], [before], "perplexity")
    assert found.mean == pytest.approx(math.exp(-after.mean()) - math.exp(-before.mean()))
    drawn = RANDOM.integers(0, 400, (4000, 400))
    resampled = np.exp(-after[drawn].mean(axis=1)) - np.exp(-before[drawn].mean(axis=1))
    assert found.error == pytest.approx(resampled.std(), rel=0.1)


@given(arrays(float, st.integers(2, 20), elements=st.floats(-10, 0)), st.sampled_from(["mean", "perplexity"]))
def test_a_model_differs_from_itself_by_nothing(values: np.ndarray, kind) -> None:
    assert difference([values], [values], kind) == (0, 0)


def test_one_document_has_no_standard_error() -> None:
    assert math.isnan(figure([np.array([1.0])], "mean").error)
    assert math.isnan(figure([np.array([1.0]), np.array([1.0, 0.0])], "mean").error)


def test_other_documents_are_not_compared() -> None:
    with pytest.raises(ValueError, match="not evaluated on the same documents"):
        difference([np.zeros(3)], [np.zeros(4)], "mean")
