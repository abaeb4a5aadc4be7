"""What a run will take: steps left, tokens, hours, bytes, money, memory."""
