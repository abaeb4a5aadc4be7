"""Weighted union of sparse distributions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.contract.columns import PAD_ID, SparseRows
from stages.contract.draws import add_draws


@dataclass(frozen=True)
class Candidate:
    """Distributions of one model over the target vocabulary.

    Attributes:
        rows: N positions.
        tail_mass: (N,) what each row's probabilities lack of 1; zeros where rows are rescaled to 1.
        gold_logprob: (N,) completed logprob of the gold next token, NaN where unknown. Rows with draws are judged by it, since
            draws give no unbiased logarithm. None: it is read from the rows themselves.
    """

    rows: SparseRows
    tail_mass: np.ndarray
    gold_logprob: np.ndarray | None = None


@dataclass(frozen=True)
class Mixture:
    """Fused distributions.

    Attributes:
        rows: N positions, at most top_k entries each, descending; log-probabilities in float32.
        tail_mass: (N,) float64; zeros with ``renormalise``.
        cut_mass: (N,) float64, the mass of entries beyond top_k, before it is rescaled or joins the tail.
    """

    rows: SparseRows
    tail_mass: np.ndarray
    cut_mass: np.ndarray


def with_draws(rows: SparseRows, draws: np.ndarray) -> SparseRows:
    """Add tokens drawn from the tails of a model's own top-k rows, (N, m), as ``draws.add_draws`` does."""
    ids, probs = add_draws(rows.ids, np.exp(rows.logprobs.astype(np.float64)), draws)
    with np.errstate(divide="ignore"):
        return SparseRows(ids, np.log(probs).astype(np.float32))


def as_candidate(rows: SparseRows, *, renormalise: bool) -> Candidate:
    """Turn a model's own rows into a candidate: rescaled to 1, or unchanged with their tail."""
    mass = np.exp(rows.logprobs.astype(np.float64)).sum(axis=1)
    if not renormalise:
        return Candidate(rows, np.where(rows.present, np.clip(1 - mass, 0, 1), 0.0))
    log_mass = np.log(np.where(rows.present, mass, 1.0))[:, None]
    return Candidate(SparseRows(rows.ids, (rows.logprobs - log_mass).astype(np.float32)), np.zeros(len(rows)))


def without(candidate: Candidate, positions: np.ndarray) -> Candidate:
    """Remove the candidate's distributions at ``positions`` ((N,) bool)."""
    ids, logprobs = candidate.rows.ids.copy(), candidate.rows.logprobs.copy()
    ids[positions], logprobs[positions] = PAD_ID, -np.inf
    gold_logprob = None if candidate.gold_logprob is None else np.where(positions, np.nan, candidate.gold_logprob)
    return Candidate(SparseRows(ids, logprobs), np.where(positions, 0.0, candidate.tail_mass), gold_logprob)


def mixed_gold_logprob(candidates: Sequence[Candidate], weights: np.ndarray) -> np.ndarray | None:
    """Return ln of what mixtures give the gold tokens, from what the candidates give them.

    Args:
        candidates: C candidates of N positions each.
        weights: (N, C), rows sum to 1 or are zero.

    Returns:
        (N,) float64, NaN where it is not known of a candidate that counts, or none counts; None where the rows say it.
    """
    known = [candidate.gold_logprob for candidate in candidates if candidate.gold_logprob is not None]
    if len(known) < len(candidates):
        return None
    probs = np.exp(np.stack(known, axis=1).astype(np.float64))
    mixed = np.where(weights > 0, weights * probs, 0.0).sum(axis=1)
    return np.log(mixed, out=np.full(len(mixed), np.nan), where=mixed > 0)


def mix(candidates: Sequence[Candidate], weights: np.ndarray, *, top_k: int, renormalise: bool) -> Mixture:
    """Add up the candidates' rows by weight and keep the largest entries.

    Args:
        candidates: C candidates of N positions each.
        weights: (N, C), rows sum to 1 or are zero.
        top_k: entries kept; ties at the border go to the smaller id.
        renormalise: rescale what is kept to 1; else the cut mass and the candidates' tails make the row's tail mass.

    Raises:
        ValueError: the shapes differ.
    """
    if weights.shape != (len(candidates[0].rows), len(candidates)):
        raise ValueError(
            f"weights have shape {weights.shape}, expected {(len(candidates[0].rows), len(candidates))}: "
            "one row per position, one column per candidate"
        )
    ids = np.concatenate([candidate.rows.ids for candidate in candidates], axis=1)
    mass = np.concatenate(
        [
            np.exp(candidate.rows.logprobs.astype(np.float64)) * weights[:, [column]]
            for column, candidate in enumerate(candidates)
        ],
        axis=1,
    )
    tail = sum(candidate.tail_mass * weights[:, column] for column, candidate in enumerate(candidates))
    ids, mass = _merge(np.where(mass > 0, ids, PAD_ID), mass)
    order = np.lexsort((ids, -mass), axis=1)
    ids, mass = np.take_along_axis(ids, order, axis=1), np.take_along_axis(mass, order, axis=1)
    cut = mass[:, top_k:].sum(axis=1)
    ids, mass = ids[:, :top_k], mass[:, :top_k]
    if renormalise:
        kept = mass.sum(axis=1, keepdims=True)
        mass = np.divide(mass, kept, out=np.zeros_like(mass), where=kept > 0)
        tail = np.zeros(len(mass))
    else:
        tail = np.clip(tail + cut, 0, 1)
    with np.errstate(divide="ignore"):
        logprobs = np.log(mass).astype(np.float32)
    return Mixture(SparseRows(ids.astype(np.int32), logprobs), tail, cut)


def _merge(ids: np.ndarray, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add up entries of one row that have the same id; entries without mass become pads.

    Args:
        ids: (N, M), ``PAD_ID`` where there is no entry.
        mass: (N, M).

    Returns:
        ids (N, M), mass (N, M): each id once per row.
    """
    num_rows, width = ids.shape
    if not width:
        return ids, mass
    order = np.argsort(ids, axis=1, kind="stable")
    ids, mass = np.take_along_axis(ids, order, axis=1), np.take_along_axis(mass, order, axis=1)
    is_new = np.ones(ids.shape, bool)
    is_new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    slot = (is_new.cumsum(axis=1) - 1) + np.arange(num_rows)[:, None] * width
    total = np.bincount(slot.ravel(), mass.ravel(), minlength=num_rows * width)
    merged = np.full(num_rows * width, PAD_ID, ids.dtype)
    merged[slot[is_new]] = ids[is_new]
    total[merged == PAD_ID] = 0.0
    return merged.reshape(ids.shape), total.reshape(ids.shape)
