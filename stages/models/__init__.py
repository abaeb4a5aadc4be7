"""Language models as the stages and the trainer use them: loading, tokenizers, heads, embeddings, devices, batches."""
