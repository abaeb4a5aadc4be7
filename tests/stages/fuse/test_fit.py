"""Fitted mixture weights, against a grid search and by their properties."""

import itertools

import numpy as np
import pytest

from stages.fuse.fit import SHRINKAGE, fit_weights, fixed_weights, mixture_nll, shrunk


def random_nll(num_candidates: int, num_positions: int = 800, *, seed: int = 0) -> np.ndarray:
    """Candidates of different worth, so that the best weights lie inside."""
    rng = np.random.default_rng(seed)
    return rng.gamma(2, np.linspace(1.0, 1.4, num_candidates), (num_positions, num_candidates))


def grid(num_candidates: int, steps: int) -> np.ndarray:
    parts = itertools.product(range(steps + 1), repeat=num_candidates - 1)
    found = [(*part, steps - sum(part)) for part in parts if sum(part) <= steps]
    return np.array(found) / steps


@pytest.mark.parametrize(("num_candidates", "steps"), [(2, 2000), (3, 100), (4, 40)])
def test_weights_are_those_of_a_grid_search(num_candidates, steps):
    nll = random_nll(num_candidates)
    weights = fit_weights(nll)
    candidates = grid(num_candidates, steps)
    found = -np.log(np.exp(-nll) @ candidates.T).mean(axis=0)
    assert mixture_nll(nll, weights).mean() <= found.min() + 1e-9
    assert np.abs(weights - candidates[found.argmin()]).max() <= 1.5 / steps
    assert weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("seed", range(5))
def test_a_mixture_is_no_worse_than_its_best_candidate(seed):
    rng = np.random.default_rng(seed)
    nll = rng.gamma(2, rng.uniform(0.2, 3, 3), (50, 3))
    assert mixture_nll(nll, fit_weights(nll)).mean() <= nll.mean(axis=0).min() + 1e-6


def test_a_candidate_that_is_always_worse_gets_nothing():
    nll = np.stack([np.full(100, 1.0), np.full(100, 2.0)], axis=1)
    np.testing.assert_allclose(fit_weights(nll), [1, 0], atol=1e-4)


def test_equal_candidates_share():
    np.testing.assert_allclose(fit_weights(np.ones((10, 4))), 0.25)
    np.testing.assert_allclose(fit_weights(np.empty((0, 3))), 1 / 3)


def test_probabilities_that_would_underflow_count():
    nll = random_nll(2)
    np.testing.assert_allclose(fit_weights(nll + 2000), fit_weights(nll), rtol=1e-6)
    found = mixture_nll(nll + 2000, np.array([0.3, 0.7]))
    np.testing.assert_allclose(found, mixture_nll(nll, np.array([0.3, 0.7])) + 2000)


def test_a_candidate_that_gives_the_gold_token_nothing_is_carried_by_the_others():
    nll = random_nll(2)
    nll[::3, 1] = np.inf
    weights = fit_weights(nll)
    assert 0 < weights[1] < fit_weights(random_nll(2))[1]
    assert np.isfinite(mixture_nll(nll, weights)).all()


def test_weights_of_a_kind_are_drawn_to_those_of_the_text():
    kind, whole = np.array([0.9, 0.1]), np.array([0.5, 0.5])
    np.testing.assert_allclose(shrunk(kind, 0, whole), whole)
    np.testing.assert_allclose(shrunk(kind, int(SHRINKAGE), whole), [0.7, 0.3])
    np.testing.assert_allclose(shrunk(kind, 10**9, whole), kind, atol=1e-5)


def test_where_a_candidate_is_missing_the_others_are_rescaled():
    present = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]], bool)
    found = fixed_weights(np.array([0.2, 0.3, 0.5]), present)
    np.testing.assert_allclose(found, [[0.2, 0.3, 0.5], [2 / 7, 0, 5 / 7], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(fixed_weights(np.array([0.0, 0.0, 1.0]), present)[2], [0, 1, 0])
