"""Analyses of finished shards: single positions, comparisons of alignments, distances and win rates."""
