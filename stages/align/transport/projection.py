"""Project a transport plan to a sparse distribution over the target's vocabulary."""

from typing import Literal, NamedTuple

import numpy as np
from numba import njit

from stages.align.vocabulary_maps import NO_ID

__all__ = ["Projected", "column_mass", "keep_largest", "landed_mass"]


class Projected(NamedTuple):
    """Sparse distributions of P positions.

    Attributes:
        ids: (P, k) int32, descending by probability, equal ones by id; -1 at pads.
        probs: (P, k) float64; 0 at pads.
        tail_mass: (P,) what the probabilities lack of 1; all 0 for a renormalised tail.
        cut_mass: (P,) probability that was moved to entries beyond the k largest.
    """

    ids: np.ndarray
    probs: np.ndarray
    tail_mass: np.ndarray
    cut_mass: np.ndarray


def column_mass(plan: np.ndarray, projection: Literal["argmax", "plan"]) -> np.ndarray:
    """Compute the mass that each target candidate receives.

    ``argmax`` (the paper's): each source row gives its largest entry (the first of equal ones) to that entry's column,
    and what arrives is rescaled to the plan's mass. ``plan``: the plan's column sums.

    Args:
        plan: (P, n, m) >= 0.
        projection: which of the two.

    Returns:
        (P, m) float64; each row has the mass of its plan.

    Source: PTA-LLM, "Logit fusion".
    """
    return plan.sum(axis=1) if projection == "plan" else _argmax_mass(plan)


def landed_mass(plan: np.ndarray, projection: Literal["argmax", "plan"]) -> np.ndarray:
    """Project the plan as ``column_mass`` does, but keep source and target apart instead of adding up columns.

    Args:
        plan: (P, n, m) >= 0.
        projection: which of the two.

    Returns:
        (P, n, m) float64; its column sums are ``column_mass``.
    """
    if projection == "plan":
        return plan
    is_largest = np.arange(plan.shape[2]) == plan.argmax(axis=2)[:, :, None]  # (P, n, m)
    selected = np.where(is_largest, plan, 0.0)
    kept, total = selected.sum(axis=(1, 2)), plan.sum(axis=(1, 2))  # (P,) each
    return selected * np.divide(total, kept, out=np.zeros_like(kept), where=kept > 0)[:, None, None]


def keep_largest(ids: np.ndarray, mass: np.ndarray, *, top_k: int, tail: Literal["renormalise", "bucket"]) -> Projected:
    """Keep each row's largest entries.

    Args:
        ids: (P, m) the entries' target ids, each once in a row; -1 at pads.
        mass: (P, m) >= 0; a row sums to at most 1. Entries without mass are left out.
        top_k: number of entries to keep.
        tail: ``"renormalise"``: what is kept is rescaled to 1. ``"bucket"``: it stays as it is, and what it lacks of 1,
            the cut mass included, is the row's tail mass.
    """
    kept_ids, kept, cut = _largest(ids, mass, top_k)
    total = kept.sum(axis=1)
    if tail == "bucket":
        return Projected(kept_ids, kept, np.maximum(0.0, 1.0 - total), cut)
    rescaled = np.divide(kept, total[:, None], out=np.zeros_like(kept), where=total[:, None] > 0)
    return Projected(kept_ids, rescaled, np.zeros(len(ids)), cut)


@njit(cache=True)
def _argmax_mass(plan: np.ndarray) -> np.ndarray:
    num_problems, n, m = plan.shape
    mass = np.zeros((num_problems, m))
    for problem in range(num_problems):
        total = 0.0
        selected = 0.0
        for x in range(n):
            best = 0
            for y in range(m):
                total += plan[problem, x, y]
                if plan[problem, x, y] > plan[problem, x, best]:
                    best = y
            mass[problem, best] += plan[problem, x, best]
            selected += plan[problem, x, best]
        if selected > 0:
            for y in range(m):
                mass[problem, y] *= total / selected
    return mass


@njit(cache=True)
def _largest(ids: np.ndarray, mass: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    num_problems, m = ids.shape
    kept_ids = np.full((num_problems, top_k), NO_ID, np.int32)
    kept = np.zeros((num_problems, top_k))
    cut = np.zeros(num_problems)
    for problem in range(num_problems):
        # Select one maximum at a time: top_k is small, so the row need not be sorted.
        left = mass[problem].copy()
        for place in range(top_k):
            best = -1
            for y in range(m):
                if left[y] <= 0 or ids[problem, y] == NO_ID:
                    continue
                if (
                    best == -1
                    or left[y] > left[best]
                    or (left[y] == left[best] and ids[problem, y] < ids[problem, best])
                ):
                    best = y
            if best == -1:
                break
            kept_ids[problem, place] = ids[problem, best]
            kept[problem, place] = left[best]
            left[best] = 0.0
        cut[problem] = left.sum()
    return kept_ids, kept, cut
