"""Batches of sequences of similar length under a token budget."""

from collections.abc import Sequence

import numpy as np


def token_batches(lengths: Sequence[int] | np.ndarray, *, max_tokens: int) -> list[np.ndarray]:
    """Group sequences into batches whose padded size stays within a budget; the longest come first.

    Similar lengths go together, so little is padded; a batch that needs too much memory shows at once.

    Args:
        lengths: (S,) tokens of each sequence, >= 1.
        max_tokens: most tokens of a batch, padding included; a longer sequence is a batch by itself.

    Returns:
        Arrays of indices into ``lengths``; each index is in exactly one. Equal lengths keep their order.
    """
    lengths = np.asarray(lengths, np.int64)
    order = np.argsort(-lengths, kind="stable")
    batches = []
    start = 0
    while start < len(order):
        size = max(1, max_tokens // int(lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches
