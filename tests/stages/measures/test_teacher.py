import math

import numpy as np
import pytest

from stages.measures.teacher import MAX_NLL, SMALLEST_TAIL, completed_nll, exact_nll, floored_nll


def test_floored_nll_is_of_the_row_rescaled_to_1():
    ids = np.array([[4, 7], [4, 7], [4, 9], [-1, -1], [4, 7]])
    probs = np.array([[0.5, 0.25], [0.5, 0.25], [1e-6, 0.9], [0, 0], [0.5, 0.5]])
    found = floored_nll(ids, probs, np.array([7, 9, 4, 4, -1]))
    np.testing.assert_allclose(found, [math.log(3), MAX_NLL, MAX_NLL, np.nan, np.nan])
    np.testing.assert_allclose(floored_nll(ids, probs * 0.6, np.array([7, 9, 4, 4, -1])), found)


def test_exact_nll_is_taken_at_the_given_positions_and_has_no_floor():
    gold = np.array([-1.0, -50.0, np.nan], np.float32)
    np.testing.assert_allclose(exact_nll(gold, np.array([1, 0, -1, 2])), [50.0, 1.0, np.nan, np.nan])
    assert np.isnan(exact_nll(np.empty(0, np.float32), np.array([-1]))).all()


class Vocabulary:
    """A target's full distributions over a small vocabulary, its window of 6, and other rows of 4."""

    def __init__(self, size: int = 12, num_positions: int = 400) -> None:
        rng = np.random.default_rng(0)
        self.size = size
        self.full = rng.dirichlet(np.full(size, 0.3), num_positions)
        order = np.argsort(-self.full, axis=1)
        self.own_ids = order[:, :6]
        self.own_probs = np.take_along_axis(self.full, self.own_ids, axis=1)
        self.gold = np.array([rng.choice(size, p=probs) for probs in self.full])
        self.gold_logprob = np.log(self.full[np.arange(num_positions), self.gold])
        # Rows within the target's window: all that the formula needs of q is known there.
        self.ids = np.array([rng.choice(window, 4, replace=False) for window in self.own_ids])
        self.probs = rng.dirichlet(np.ones(5), num_positions)[:, :4]
        self.tail_mass = 1 - self.probs.sum(axis=1)

    def completed(self, ids, probs, tail_mass, gold=None, gold_logprob=None):
        return completed_nll(
            ids,
            probs,
            tail_mass,
            self.gold if gold is None else gold,
            own_ids=self.own_ids,
            own_probs=self.own_probs,
            own_gold_logprob=self.gold_logprob if gold_logprob is None else gold_logprob,
        )


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary()


def test_completed_rows_are_distributions(vocabulary):
    probs = np.zeros_like(vocabulary.full)
    for token in range(vocabulary.size):
        gold = np.full(len(probs), token)
        logprob = np.log(vocabulary.full[:, token])
        probs[:, token] = np.exp(
            -vocabulary.completed(vocabulary.ids, vocabulary.probs, vocabulary.tail_mass, gold, logprob)
        )
    np.testing.assert_allclose(probs.sum(axis=1), 1)
    listed = np.take_along_axis(probs, vocabulary.ids, axis=1)
    np.testing.assert_allclose(listed, vocabulary.probs)
    # What a row does not list is divided as the target divides it.
    for row in range(0, len(probs), 37):
        outside = np.setdiff1d(np.arange(vocabulary.size), vocabulary.ids[row])
        shares = vocabulary.full[row, outside] / vocabulary.full[row, outside].sum()
        np.testing.assert_allclose(probs[row, outside], vocabulary.tail_mass[row] * shares)


@pytest.mark.parametrize("width", [1, 3, 6])
def test_the_target_s_own_rows_have_the_target_s_nll(vocabulary, width):
    ids, probs = vocabulary.own_ids[:, :width], vocabulary.own_probs[:, :width]
    found = vocabulary.completed(ids, probs, 1 - probs.sum(axis=1))
    np.testing.assert_allclose(found, -vocabulary.gold_logprob, rtol=1e-9)
    assert (ids != vocabulary.gold[:, None]).all(axis=1).any()


def test_an_id_outside_the_target_s_window_makes_the_figure_too_large_at_most(vocabulary):
    rng = np.random.default_rng(1)
    ids = np.array([rng.choice(vocabulary.size, 4, replace=False) for _ in vocabulary.gold])
    found = vocabulary.completed(ids, vocabulary.probs, vocabulary.tail_mass)
    outside = 1 - np.take_along_axis(vocabulary.full, ids, axis=1).sum(axis=1)
    truth = -np.log(vocabulary.tail_mass * np.exp(vocabulary.gold_logprob) / outside)
    is_rest = (ids != vocabulary.gold[:, None]).all(axis=1)
    assert (found[is_rest] >= truth[is_rest] - 1e-9).all()
    assert (found[is_rest] > truth[is_rest] + 1e-3).any()


def test_a_row_rescaled_to_1_leaves_an_unlisted_gold_token_nothing(vocabulary):
    rescaled = vocabulary.probs / vocabulary.probs.sum(axis=1, keepdims=True)
    found = vocabulary.completed(vocabulary.ids, rescaled, None)
    is_gold = vocabulary.ids == vocabulary.gold[:, None]
    is_listed = is_gold.any(axis=1)
    assert is_listed.any()
    assert np.isinf(found[~is_listed]).all()
    np.testing.assert_allclose(np.exp(-found[is_listed]), rescaled[is_gold])


def test_a_tail_that_was_rounded_away_is_not_nothing():
    def completed(own_probs: list[float]) -> np.ndarray:
        return completed_nll(
            np.array([[3, 5], [-1, -1], [3, 5]]),
            np.array([[0.9, 0.1], [0, 0], [0.9, 0.1]]),
            np.zeros(3),
            np.array([8, 8, -1]),
            own_ids=np.array([[3, 5]] * 3),
            own_probs=np.array([own_probs] * 3),
            own_gold_logprob=np.log(np.full(3, 1e-6)),
        )

    np.testing.assert_allclose(completed([0.5, 0.25]), [-math.log(SMALLEST_TAIL * 1e-6 / 0.25), np.nan, np.nan])
    # Rounded logprobs of the target's window sum to more than 1: what is left is at least the gold token.
    np.testing.assert_allclose(completed([0.9, 0.1001]), [-math.log(SMALLEST_TAIL), np.nan, np.nan])
