"""``ptafuse interpret``: effect of fusing, in figures that people can reason about; see docs/interpretability.md."""
