"""Training blocks, their order, and the batches made of them."""
