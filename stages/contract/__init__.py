"""What a stage's result is on disk, and the few things on which all stages agree."""
