"""Means over documents, with the uncertainty of having read these documents and no others."""

import math
from typing import NamedTuple

import numpy as np

__all__ = ["Estimate", "clustered_mean", "weighted_mean"]


class Estimate(NamedTuple):
    """Mean, and its standard error over documents (NaN for fewer than two)."""

    mean: float
    error: float

    def signed(self, digits: int = 4) -> str:
        """Format a difference and its error, as in ``+0.0012 ± 0.0003``; without an error where none is known."""
        return f"{self.mean:+.{digits}f}" + ("" if math.isnan(self.error) else f" ± {self.error:.{digits}f}")


def weighted_mean(figures: np.ndarray, weights: np.ndarray) -> Estimate:
    """Average documents' figures, with the standard error of the ratio estimator.

    Args:
        figures: (D,) each document's own mean.
        weights: (D,) > 0: bytes, positions, whatever each figure is a mean over.

    Returns:
        The mean over all bytes or positions; NaN without documents.
    """
    if not len(figures):
        return Estimate(math.nan, math.nan)
    mean = float(np.average(figures, weights=weights))
    if len(figures) < 2:
        return Estimate(mean, math.nan)
    spread = weights / weights.sum() * (figures - mean)
    return Estimate(mean, float(np.sqrt(len(figures) / (len(figures) - 1) * (spread**2).sum())))


def clustered_mean(values: np.ndarray, documents: np.ndarray) -> Estimate:
    """Average the values of single positions, with the standard error over documents.

    Positions of one document are not independent, so each document counts as one observation.

    Args:
        values: (P,) finite.
        documents: (P,) the document that each position is in.
    """
    _, place, counts = np.unique(documents, return_inverse=True, return_counts=True)
    return weighted_mean(np.bincount(place, values) / counts, counts.astype(np.float64))
