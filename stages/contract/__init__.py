"""On-disk form of a stage's result, and the few conventions that all stages share."""
