"""What is computed: one folder per stage, what they know of models, the format on disk in which they meet, and statistics."""
