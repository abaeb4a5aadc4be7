"""Forecast of the rest of a run: steps left, tokens, hours, bytes, money, memory."""
