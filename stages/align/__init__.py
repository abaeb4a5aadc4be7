"""Move each source model's distributions into the target model's vocabulary: pairing, transport, projection."""
