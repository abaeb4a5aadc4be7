"""What is wrong with a model's files, found without loading its weights."""
