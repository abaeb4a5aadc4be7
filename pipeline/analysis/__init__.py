"""What finished shards say: single positions, comparisons of alignments, distances and win rates."""
