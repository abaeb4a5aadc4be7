"""Statistics of predictions: cross-entropies, the nucleus of a distribution, means with standard errors."""
