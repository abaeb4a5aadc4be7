"""Engine that computes the pending part of one step, here or on Ray, and commits the results."""
