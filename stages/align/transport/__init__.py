"""Move a source distribution to target tokens: support, plan, projection."""
