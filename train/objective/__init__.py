"""Training objective: the loss on gold tokens and fused distributions."""
