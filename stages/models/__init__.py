"""What the stages and the trainer know of language models: loading, tokenizers, heads, embeddings, devices, batches."""
