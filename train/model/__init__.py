"""The model in training: its architecture, adapters, sharding, memory and speed, and its export."""
