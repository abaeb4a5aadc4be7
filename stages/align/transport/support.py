"""Target candidates to which a source's mass may move, and their prior."""

import numpy as np
from numba import njit

from stages.align.vocabulary_maps import NO_ID

__all__ = ["target_support", "union_support"]


def target_support(target_ids: np.ndarray, target_probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the target's own candidates with their prior (the paper's support).

    Args:
        target_ids: (P, k) the target's largest entries, descending; -1 at pads.
        target_probs: (P, k) their probabilities; 0 at pads.

    Returns:
        ids (P, k) and prior (P, k); a prior sums to 1, or to 0 where the target has no entry.
    """
    return target_ids, _normalised(target_probs)


def union_support(
    target_ids: np.ndarray, target_probs: np.ndarray, source_ids: np.ndarray, first_token: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the target's own candidates, joined by the target token that begins each source candidate's text.

    An added token that is not among the target's candidates gets half the probability of the least of them.

    Args:
        target_ids: (P, k) the target's largest entries, descending; -1 at pads.
        target_probs: (P, k) their probabilities; 0 at pads.
        source_ids: (P, n) the source's candidates; -1 at pads.
        first_token: (V of the source,) from ``prefix_map``.

    Returns:
        ids (P, k + n), each id once, -1 at pads, and prior (P, k + n), which sums to 1 (to 0 where the target has no
        entry).
    """
    ids, prior = _union(target_ids, target_probs, source_ids, first_token)
    return ids, _normalised(prior)


def _normalised(weights: np.ndarray) -> np.ndarray:
    total = weights.sum(axis=1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


@njit(cache=True)
def _union(
    target_ids: np.ndarray, target_probs: np.ndarray, source_ids: np.ndarray, first_token: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    num_problems, k = target_ids.shape
    n = source_ids.shape[1]
    ids = np.full((num_problems, k + n), NO_ID, np.int32)
    prior = np.zeros((num_problems, k + n))
    for problem in range(num_problems):
        # 1. Copy the target's own candidates, which come first and keep their order.
        size = 0
        for y in range(k):
            if target_ids[problem, y] != NO_ID:
                ids[problem, size] = target_ids[problem, y]
                prior[problem, size] = target_probs[problem, y]
                size += 1
        if size == 0:
            continue
        # 2. Add the tokens that begin source candidates. The last candidate is the least probable one.
        added_prior = 0.5 * prior[problem, size - 1]
        for x in range(n):
            if source_ids[problem, x] == NO_ID:
                continue
            token = first_token[source_ids[problem, x]]
            if token == NO_ID:
                continue
            is_new = True
            for y in range(size):
                if ids[problem, y] == token:
                    is_new = False
                    break
            if is_new:
                ids[problem, size] = token
                prior[problem, size] = added_prior
                size += 1
    return ids, prior
