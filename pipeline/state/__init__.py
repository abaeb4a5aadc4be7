"""What a run directory holds now: where it stands, whether its files are sound, what may be removed."""
