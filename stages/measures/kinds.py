"""Averages over kinds of documents, each kind weighted equally however much text it has."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.measures.standard_error import Estimate, weighted_mean


@dataclass(frozen=True)
class KindFigures:
    """Means of K kinds of documents, and the average of these means.

    Attributes:
        means: kind -> the mean over all bytes of its documents, in the order of the kinds' names.
        average: the mean of these means, and its standard error over documents.
    """

    means: dict[str, float]
    average: Estimate

    @property
    def num_won(self) -> int:
        """Number of kinds with a mean below 0: for a difference in bits per byte, the kinds that improved."""
        return sum(mean < 0 for mean in self.means.values())

    @property
    def won(self) -> str:
        """Share of kinds won, as shown to people: "15 of 18"."""
        return f"{self.num_won} of {len(self.means)}"


def kind_figures(figures: np.ndarray, weights: np.ndarray, kinds: Sequence[str]) -> KindFigures:
    """Average documents' figures by kind, then over kinds.

    The documents are a sample stratified by kind, so the variance of the average is the sum of the kinds' variances over K^2.
    A kind's variance is that of the ratio estimator (``weighted_mean``). One document says nothing about its kind's spread:
    there, the mean of the other kinds' variances between documents stands in for it.

    Args:
        figures: (D,) each document's own mean.
        weights: (D,) > 0: bytes.
        kinds: kind of each of the D documents.

    Returns:
        NaN as the error where no kind has two documents; NaN for both without documents.
    """
    names, place = np.unique(np.array(kinds, dtype=str), return_inverse=True)
    if not len(names):
        return KindFigures({}, Estimate(math.nan, math.nan))
    members = [np.flatnonzero(place == index) for index in range(len(names))]
    estimates = [weighted_mean(figures[chosen], weights[chosen]) for chosen in members]
    # A kind with one document has no spread of its own, so it borrows the other kinds' mean spread.
    spreads = [figures[chosen].var(ddof=1) for chosen in members if len(chosen) > 1]
    typical = float(np.mean(spreads)) if spreads else math.nan
    variances = [
        estimate.error**2 if len(chosen) > 1 else typical for estimate, chosen in zip(estimates, members, strict=True)
    ]
    means = {str(name): estimate.mean for name, estimate in zip(names, estimates, strict=True)}
    average = Estimate(float(np.mean(list(means.values()))), math.sqrt(sum(variances)) / len(names))
    return KindFigures(means, average)
