"""Logits stage: each model's top-k logprobs at every position of the train segments."""
