"""Results of whole models: bits per byte on held-out text, baselines without training, benchmarks."""
