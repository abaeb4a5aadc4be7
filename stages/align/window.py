"""The window: which of a model's largest entries take part."""

import numpy as np

from stages.align.support import NO_ID
from stages.measures.nucleus import outside_nucleus


def narrow(ids: np.ndarray, probs: np.ndarray, *, top_k: int, top_p: float | None) -> tuple[np.ndarray, np.ndarray]:
    """The first ``top_k`` entries of each row, or fewer: the smallest prefix of them that holds ``top_p``.

    A row has at least one entry, and all ``top_k`` where together they hold less than ``top_p``.

    Args:
        ids: (P, k) descending by probability; -1 at pads.
        probs: (P, k) probabilities over the full vocabulary; 0 at pads.
        top_k: the most entries of a row.
        top_p: probability that a row must hold; None: any.

    Returns:
        ids and probs, (P, min(k, top_k)), with pads where the prefix ends.
    """
    ids, probs = ids[:, :top_k], probs[:, :top_k]
    if top_p is None:
        return ids, probs
    outside = outside_nucleus(probs, top_p)
    return np.where(outside, NO_ID, ids).astype(ids.dtype), np.where(outside, 0.0, probs)
