"""A configuration in its run directory: its steps, their inputs, and what is recorded of them."""
