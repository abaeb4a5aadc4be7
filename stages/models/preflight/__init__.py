"""Find problems of a model's files without loading its weights."""
