"""What it costs to move mass from a source token to a target token."""
