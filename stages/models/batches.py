"""Batches of sequences of similar length under a token budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from stages.models.windows import ContextWindow

NO_GOLD: Final = -1
"""Value where there is no gold token."""


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


@dataclass(frozen=True)
class PaddedBatch:
    """Model input of B windows and T positions, padded on the right, and the P positions that are taken from it.

    Attributes:
        input_ids: (B, T) int64.
        mask: (B, T) int64; 1 where a token stands.
        taken: (B, T) bool; P are True.
        gold_ids: (P,) int64, the token after each taken position; ``NO_GOLD`` at the last of its sequence.
        rows: (P,) int64, where each taken position lies when all sequences stand end to end.
    """

    input_ids: np.ndarray
    mask: np.ndarray
    taken: np.ndarray
    gold_ids: np.ndarray
    rows: np.ndarray


def padded_batch(
    batch: Sequence[tuple[int, ContextWindow]], sequences: Sequence[np.ndarray], starts: np.ndarray
) -> PaddedBatch:
    """Put windows side by side.

    Args:
        batch: (index of the sequence, window).
        sequences: (N,) token ids each.
        starts: (S + 1,) where each sequence begins when all stand end to end.
    """
    shape = (len(batch), max(len(window) for _, window in batch))
    input_ids, mask, taken = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
    rows, gold = [], []
    for row, (index, window) in enumerate(batch):
        ids = sequences[index]
        input_ids[row, : len(window)] = window.tokens(ids)
        mask[row, : len(window)] = 1
        taken[row, window.taken] = True
        rows.append(starts[index] + np.arange(window.take_start, window.end))
        gold.append(np.append(ids[1:], NO_GOLD)[window.take_start : window.end])
    return PaddedBatch(input_ids, mask, taken, np.concatenate(gold).astype(np.int64), np.concatenate(rows))
