"""Documents of a corpus: find its files, read their formats, number every document."""
