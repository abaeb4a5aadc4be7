"""What training minimises: the loss on gold tokens and fused distributions."""
