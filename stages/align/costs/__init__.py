"""Costs of moving mass from a source token to a target token."""
