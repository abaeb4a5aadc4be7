"""Other texts than the held-out split: which documents of a corpus are scored, and none that training has read."""
