"""The documents of a corpus: find its files, read their formats, give every document a number."""
