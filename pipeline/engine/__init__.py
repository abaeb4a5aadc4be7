"""The engine: computes the pending part of one step, here or on Ray, and commits what it computed."""
