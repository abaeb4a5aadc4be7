"""Tokens drawn from the tail of a window, and how a row of a logits table with draws becomes one distribution.

A position keeps its k largest entries exactly, and m tokens drawn from the other ids in proportion to their probability. Each
draw stands for tail / m, tail being what the entries lack of 1. The expected row is the full distribution, whatever k and m.

Source: "Random Sampling Knowledge Distillation" (arXiv 2503.16870).
"""

from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.contract.columns import PAD_ID, padded_ids

SAMPLE_IDS: Final = "sample_ids"
"""The column of the draws; see ``schemas.logits_schema``."""


def has_draws(table: pa.Table) -> bool:
    """Return whether a logits table has draws."""
    return SAMPLE_IDS in table.schema.names


def without_draws(table: pa.Table) -> pa.Table:
    """Return a logits table with only its exact entries, for comparisons of distributions token by token.

    -ln of a noisy probability is a biased estimate of -ln of the probability.
    """
    return table.drop_columns([SAMPLE_IDS]) if has_draws(table) else table


def num_draws(table: pa.Table) -> int:
    """Return m, the number of draws of each position that has any; 0 for a table without draws."""
    if not has_draws(table):
        return 0
    return pc.max(pc.list_value_length(pc.list_flatten(table[SAMPLE_IDS]))).as_py() or 0


def draws_row(table: pa.Table, row: int) -> np.ndarray:
    """Return the draws of one table row: (N, m) int32, ascending, ``PAD_ID`` where a position has none."""
    return padded_ids(table, SAMPLE_IDS, row)


def add_draws(ids: np.ndarray, probs: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add draws to exact entries.

    A token that was drawn c times gets c * tail / m. Entries of a row are in descending order of probability, as those of a
    window are; at equal ones exact entries come first, then lower ids.

    Args:
        ids: (N, k) exact entries, ``PAD_ID`` at pads.
        probs: (N, k) float64, their probabilities over the full vocabulary; 0 at pads.
        draws: (N, m) ascending, none of them among the exact entries; ``PAD_ID`` at positions without draws.

    Returns:
        ids (N, k + m) int32 and probs (N, k + m) float64, pads last. Rows with draws sum to 1.
    """
    size, width = draws.shape
    is_draw = draws != PAD_ID
    is_first = is_draw.copy()
    is_first[:, 1:] &= draws[:, 1:] != draws[:, :-1]
    # Equal draws stand side by side: the first of them names the token, and all of them count for it.
    slot = is_first.cumsum(axis=1) - 1 + np.arange(size)[:, None] * width
    counts = np.bincount(slot[is_draw], minlength=size * width).reshape(size, width)
    tokens = np.full(size * width, PAD_ID, np.int32)
    tokens[slot[is_first]] = draws[is_first]
    tail = np.maximum(0.0, 1.0 - probs.sum(axis=1))
    mass = counts * (tail / np.maximum(is_draw.sum(axis=1), 1))[:, None]
    # Where rounded entries sum to 1 or more, nothing is left to the draws.
    all_ids = np.concatenate([ids, np.where(mass > 0, tokens.reshape(size, width), PAD_ID)], axis=1).astype(np.int32)
    all_probs = np.concatenate([probs, mass], axis=1)
    order = np.lexsort((all_ids == PAD_ID, -all_probs), axis=1)
    return np.take_along_axis(all_ids, order, axis=1), np.take_along_axis(all_probs, order, axis=1)
