"""State of a run directory: progress, soundness of its files, and what may be removed."""
