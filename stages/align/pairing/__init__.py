"""Which source token belongs to which target token."""
