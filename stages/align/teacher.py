"""Teacher NLL: how well a distribution knows the gold next token, and fair comparisons of several ways to get one.

Ways of aligning cover different positions, and easy positions are the first to be covered: a comparison is of the
positions that all of them have.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from stages.contract.entropy import TEACHER_FLOOR

MAX_NLL: Final = -math.log(TEACHER_FLOOR)
"""What a position costs at most, in nats: a candidate list that misses the gold token."""


def distribution_nll(ids: np.ndarray, probs: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """-ln p(gold next token) under sparse distributions, at most ``MAX_NLL``.

    Args:
        ids: (P, k), -1 at pads. A row of pads is no distribution.
        probs: (P, k), 0 at pads.
        gold: (P,) gold next tokens' ids; negative: there is none.

    Returns:
        (P,) nats; NaN where there is no distribution or no gold token.
    """
    found = np.where(ids == gold[:, None], probs, 0.0).sum(axis=1)
    nll = -np.log(np.maximum(found, TEACHER_FLOOR))
    return np.where((ids >= 0).any(axis=1) & (gold >= 0), nll, np.nan)


def own_nll(gold_logprob: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """-ln p(gold next token) of a model over its full vocabulary, at given positions of its own, at most ``MAX_NLL``.

    Args:
        gold_logprob: (N,) of the model's segment; NaN at the last position.
        positions: (P,) in it, e.g. the ``source_position`` of aligned rows; negative: none.

    Returns:
        (P,) nats; NaN where there is no position, or nothing follows it.
    """
    if not len(gold_logprob):
        return np.full(len(positions), np.nan)
    return np.where(positions >= 0, np.minimum(-gold_logprob.astype(np.float64)[positions], MAX_NLL), np.nan)


@dataclass(frozen=True)
class SharedNll:
    """A comparison on the same positions.

    Attributes:
        num_positions: positions that every entry has.
        means: mean NLL of each entry there, in nats, in the order given; NaN without positions.
        coverage: share of all positions that each entry has by itself.
    """

    num_positions: int
    means: dict[str, float]
    coverage: dict[str, float]


def compare_shared(nll: Mapping[str, np.ndarray]) -> SharedNll:
    """Compare several distributions on the positions that all of them have.

    To compare ways of aligning: run ``AlignStage`` with each configuration on the same inputs; for each, join the
    segments' ``distribution_nll`` in the order of the target's rows. The source itself is ``own_nll`` at an alignment's
    ``source_position``, the target itself ``distribution_nll`` of its window, or ``own_nll`` at all its positions.

    Args:
        nll: name -> (P,) nats, NaN where an entry has no distribution; the same P positions in each.

    Raises:
        ValueError: nothing to compare, or entries of different lengths: they cannot be of the same positions.
    """
    lengths = {name: len(values) for name, values in nll.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"numbers of positions {lengths}: expected one number, of at least one entry")
    values = np.stack([np.asarray(entry, np.float64) for entry in nll.values()])
    shared = np.isfinite(values).all(axis=0)
    num_shared = int(shared.sum())
    means = values[:, shared].mean(axis=1) if num_shared else np.full(len(values), np.nan)
    coverage = np.isfinite(values).mean(axis=1) if values.shape[1] else np.full(len(values), np.nan)
    return SharedNll(
        num_positions=num_shared,
        means=dict(zip(nll, means.tolist(), strict=True)),
        coverage=dict(zip(nll, coverage.tolist(), strict=True)),
    )
