"""``ptafuse interpret``: what fusing did, in figures that people can think about; see docs/interpretability.md."""
