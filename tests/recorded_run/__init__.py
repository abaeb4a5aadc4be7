"""A finished run as an earlier version of ptafuse left it, with its models and text; see ``record.py``."""
