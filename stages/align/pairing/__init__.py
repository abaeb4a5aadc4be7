"""Pairing of source tokens with target tokens."""
