"""The smallest prefix of a sorted distribution that holds a given probability (``top_p``, nucleus)."""

import numpy as np


def outside_nucleus(probs: np.ndarray, top_p: float) -> np.ndarray:
    """Mark the entries after the smallest prefix of each row that holds ``top_p``.

    A row keeps its first entry at least, and all of them where together they hold less than ``top_p``.

    Args:
        probs: (P, k) probabilities over the full vocabulary, descending; 0 at pads.
        top_p: probability that a row must hold.

    Returns:
        (P, k) bool.
    """
    outside = np.cumsum(probs, axis=1) - probs >= top_p
    outside[:, :1] = False
    return outside
