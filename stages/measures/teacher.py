"""Teacher NLL: how well a sparse distribution predicts the gold next token.

There are two measures. Rows are comparable only within the same measure:

- *completed*: the row's tail mass is divided among the tokens that the row does not list, in proportion to the target's
  own distribution. This needs neither a floor nor a free constant, and the target's own rows get the target's NLL.
- *floored*: the row is rescaled to 1, and a gold token that it does not list costs ``MAX_NLL``. This compares truncated
  rows with truncated rows: a row can beat the target's own window and still be worse than the target.
"""

import math
from typing import Final

import numpy as np

TEACHER_FLOOR: Final = 1e-4
"""Smallest probability that the floored NLL counts."""

MAX_NLL: Final = -math.log(TEACHER_FLOOR)
"""Largest floored NLL of a position, 9.2 nats: the cost of a row that does not list the gold token."""

SMALLEST_TAIL: Final = 2.0**-25
"""Value of a stored tail mass of 0: half of the smallest mass that float16, in which tails are stored, distinguishes
from 0. A row with a tail never claims that no other token is possible."""


def floored_nll(ids: np.ndarray, probs: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Compute -ln p(gold next token) under sparse distributions rescaled to 1, at most ``MAX_NLL``.

    Args:
        ids: (P, k), -1 at pads. A row of pads means that there is no distribution.
        probs: (P, k), 0 at pads; with or without a tail.
        gold: (P,) gold next tokens' ids; negative: there is none.

    Returns:
        (P,) nats; NaN where there is no distribution or no gold token.
    """
    gold_probs, total = _listed(ids, probs, gold), probs.sum(axis=1)
    rescaled = np.divide(gold_probs, total, out=np.zeros_like(gold_probs), where=total > 0)
    return np.where(_has_both(ids, gold), -np.log(np.maximum(rescaled, TEACHER_FLOOR)), np.nan)


def completed_nll(
    ids: np.ndarray,
    probs: np.ndarray,
    tail_mass: np.ndarray | None,
    gold: np.ndarray,
    *,
    own_ids: np.ndarray,
    own_probs: np.ndarray,
    own_gold_logprob: np.ndarray,
) -> np.ndarray:
    """Compute -ln p(gold next token) under sparse distributions whose tails are divided as the target divides its own.

    p(g) = row(g) where the row lists g, else tail * q(g) / (1 - sum of q over the row's ids), q being the target's own
    distribution before training. Of q the window and q(g) are known; an id that the row lists and the target's window does
    not counts as q = 0, which makes p(g) a little too small, never too large.

    Args:
        ids: (P, k), -1 at pads. A row of pads means that there is no distribution.
        probs: (P, k), 0 at pads.
        tail_mass: (P,) what each row leaves to other tokens; None: rows are rescaled to 1 and leave them nothing.
        gold: (P,) gold next tokens' ids; negative: there is none.
        own_ids: (P, m) the target's window at the same positions, -1 at pads.
        own_probs: (P, m) q there; 0 at pads.
        own_gold_logprob: (P,) ln q(gold), over the full vocabulary.

    Returns:
        (P,) nats; infinite where a row without a tail does not list the gold token; NaN where there is no distribution or
        no gold token.
    """
    gold_probs = _listed(ids, probs, gold)
    if tail_mass is not None:
        rest = np.flatnonzero((gold_probs <= 0) & _has_both(ids, gold))
        own_gold = np.exp(own_gold_logprob[rest].astype(np.float64))
        is_listed = (own_ids[rest][:, :, None] == ids[rest][:, None, :]).any(axis=2)  # (rest, m)
        outside = 1.0 - np.where(is_listed, own_probs[rest], 0.0).sum(axis=1)
        # Rounded logprobs can sum to more than 1; outside the row there is at least the gold token itself.
        share = own_gold / np.maximum(outside, own_gold)
        gold_probs[rest] = np.maximum(tail_mass[rest], SMALLEST_TAIL) * share
    with np.errstate(divide="ignore"):
        return np.where(_has_both(ids, gold), -np.log(gold_probs), np.nan)


def exact_nll(gold_logprob: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Look up -ln p(gold next token) of a model over its full vocabulary, at given positions of its segment.

    Args:
        gold_logprob: (N,) of the model's segment; NaN at the last position.
        positions: (P,) in it, e.g. the ``source_position`` of aligned rows; negative: none.

    Returns:
        (P,) nats; NaN where there is no position, or nothing follows it.
    """
    if not len(gold_logprob):
        return np.full(len(positions), np.nan)
    return np.where(positions >= 0, -gold_logprob.astype(np.float64)[positions], np.nan)


def _listed(ids: np.ndarray, probs: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Return the probability that each row itself gives the gold token, (P,)."""
    return np.where(ids == gold[:, None], probs, 0.0).sum(axis=1)


def _has_both(ids: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Return whether there is both a distribution and a gold token, (P,) bool."""
    return (ids >= 0).any(axis=1) & (gold >= 0)
