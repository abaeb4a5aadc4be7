"""TOML file of a run: one class per section, and the reader that checks it."""
