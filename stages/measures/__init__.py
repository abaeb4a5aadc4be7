"""Statistics of predictions: cross-entropies, the nucleus of a distribution, means with standard errors."""

from stages.measures.cross_entropy import CrossEntropy, cross_entropy
from stages.measures.standard_error import Estimate, clustered_mean, weighted_mean
from stages.measures.teacher import completed_nll, exact_nll, floored_nll

__all__ = [
    "CrossEntropy",
    "Estimate",
    "clustered_mean",
    "completed_nll",
    "cross_entropy",
    "exact_nll",
    "floored_nll",
    "weighted_mean",
]
