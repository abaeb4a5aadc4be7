"""Texts, tables and durations as people read them, in the terminal and on the page."""
