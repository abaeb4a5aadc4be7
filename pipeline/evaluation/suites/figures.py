"""Metrics of a suite from its documents' values, with standard errors; sub-tasks are strata of fixed sizes."""

import math
from collections.abc import Sequence
from typing import Final, Literal

import numpy as np

from stages.measures.standard_error import Estimate

Kind = Literal["mean", "perplexity"]


def figure(strata: Sequence[np.ndarray], kind: Kind) -> Estimate:
    """Compute a metric over all documents of all sub-tasks: each sub-task counts by its number of documents.

    Args:
        strata: the values of each sub-task, (D_k,): scores, or for a perplexity log-likelihoods in nats.
        kind: kind of the metric.

    Returns:
        The figure and its standard error over documents, the sub-tasks taken as they are; for a perplexity by the delta
        method. NaN where a sub-task has fewer than two documents.
    """
    value = _value(strata, kind)
    return Estimate(value, _error([_influence(values, value, kind) for values in strata]))


def difference(strata: Sequence[np.ndarray], baseline: Sequence[np.ndarray], kind: Kind) -> Estimate:
    """Compute the metric minus the baseline's on the same documents in the same order, paired by document.

    Args:
        strata: values of each sub-task, as for ``figure``.
        baseline: the baseline's values.
        kind: kind of the metric.

    Raises:
        ValueError: the two have other numbers of documents.
    """
    if [len(values) for values in strata] != [len(values) for values in baseline]:
        raise ValueError("the two were not evaluated on the same documents")
    value, before = _value(strata, kind), _value(baseline, kind)
    return Estimate(
        value - before,
        _error(
            [
                _influence(values, value, kind) - _influence(others, before, kind)
                for values, others in zip(strata, baseline, strict=True)
            ]
        ),
    )


def _value(strata: Sequence[np.ndarray], kind: Kind) -> float:
    mean = float(np.concatenate(strata).mean())
    return mean if kind == "mean" else math.exp(-mean)


def _influence(values: np.ndarray, value: float, kind: Kind) -> np.ndarray:
    """Return the derivative of the metric by each document's value, times D, up to a constant."""
    return values if kind == "mean" else -value * values


def _error(influences: Sequence[np.ndarray]) -> float:
    if any(len(values) < MIN_DOCUMENTS for values in influences):
        return math.nan
    total = sum(len(values) for values in influences)
    return math.sqrt(sum(len(values) * float(values.var(ddof=1)) for values in influences)) / total


MIN_DOCUMENTS: Final = 2
"""Smallest number of documents of a sub-task for a standard error."""
