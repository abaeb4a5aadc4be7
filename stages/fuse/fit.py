"""Weights of a linear mixture of the candidates, fitted by expectation maximisation (``function = "fitted"``).

With p_c(g) the completed probability (``stages.measures.teacher``) that candidate c gives the gold token g of position t,
the weights maximise sum_t ln sum_c w_c p_c(g_t). The objective is concave, and each iteration raises it:

    r_ct = w_c p_c(g_t) / sum_c' w_c' p_c'(g_t),    w_c <- mean_t r_ct.

Source: Dempster, Laird and Rubin (1977); for mixtures of language models: Jelinek and Mercer (1980).
"""

from typing import Final

import numpy as np

SHRINKAGE: Final = 1_000.0
"""Number of positions that the whole text's weights count as when the weights of a kind of document are fitted."""

_TOLERANCE: Final = 1e-6
"""Largest change of a weight at which the iteration ends."""
_MAX_ITERATIONS: Final = 10_000


def fit_weights(nll: np.ndarray) -> np.ndarray:
    """Fit the weights of a mixture.

    Args:
        nll: (T, C) nats, -ln p_c(g_t); infinite where a candidate gives the gold token nothing.

    Returns:
        (C,) float64, sum 1; all equal without positions. On these positions the mixture is no worse than its best
        candidate.
    """
    num_candidates = nll.shape[1]
    # Scaled by each position's largest probability, which does not change r and prevents underflow.
    best = nll.min(axis=1, keepdims=True, initial=np.inf)
    probs = np.exp(best - nll.astype(np.float64))[np.isfinite(best[:, 0])]
    weights = np.full(num_candidates, 1 / num_candidates)
    if not len(probs):
        return weights
    for _ in range(_MAX_ITERATIONS):
        mixture = probs @ weights
        updated = weights * (probs / mixture[:, None]).mean(axis=0)
        updated /= updated.sum()
        change = np.abs(updated - weights).max()
        weights = updated
        if change < _TOLERANCE:
            break
    return weights


def shrunk(weights: np.ndarray, num_positions: int, whole: np.ndarray) -> np.ndarray:
    """Draw the weights of a kind of document towards those of the whole text, the more the fewer positions it has.

    Args:
        weights: (C,) fitted on the kind's positions.
        num_positions: number of positions.
        whole: (C,) fitted on all positions.
    """
    return (num_positions * weights + SHRINKAGE * whole) / (num_positions + SHRINKAGE)


def mixture_nll(nll: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Compute -ln sum_c w_c p_c(g_t), (T,) nats.

    Args:
        nll: (T, C) as for ``fit_weights``.
        weights: (C,).
    """
    best = nll.min(axis=1, keepdims=True)
    return best[:, 0] - np.log(np.exp(best - nll) @ weights)


def fixed_weights(weights: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Compute the candidates' weights at each position: if one is missing, the others are rescaled.

    Args:
        weights: (C,), sum 1.
        present: (N, C) bool, the candidate has a distribution at the position.

    Returns:
        (N, C) float64; a row sums to 1, or is zero where no candidate has a distribution. Candidates that are present but
        have no weight at all share it equally.
    """
    scores = np.where(present, weights, 0.0)
    total = scores.sum(axis=1, keepdims=True)
    scores = np.where(total > 0, scores, present.astype(np.float64))
    total = scores.sum(axis=1, keepdims=True)
    return np.divide(scores, total, out=np.zeros_like(scores), where=total > 0)
