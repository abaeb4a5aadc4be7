"""Working state of the balanced solver.

Plain Python on purpose: numba's cache of the solver does not notice a compiled function that changes in another file.
"""

from typing import NamedTuple

import numpy as np


class Lanes(NamedTuple):
    """Problems being solved; the last axis of every array is the lane."""

    a: np.ndarray  # (n, L)
    b: np.ndarray  # (m, L)
    inverse_a: np.ndarray  # (n, L), 0 where a is
    plan: np.ndarray  # (n, m, L), rows exact
    columns: np.ndarray  # (m, L) column sums of the plan
    potential: np.ndarray  # (m, L) of the columns at the last exponential, in units of cost
    factor: np.ndarray  # (m, L) by which the columns were multiplied since, up to the rows' rescaling
    trial: np.ndarray  # (m, L) factors of a step
    trial_columns: np.ndarray  # (m, L)
    row_scale: np.ndarray  # (n, L)
    laplacian: np.ndarray  # (m, m, L)
    direction: np.ndarray  # (m, L) Newton's step, in epsilons
    error: np.ndarray  # (L,) largest violation of a column's marginal
    trial_error: np.ndarray  # (L,)
    epsilon: np.ndarray  # (L,) on its way down
    target_error: np.ndarray  # (L,) at which the current epsilon is solved well enough
    step_fraction: np.ndarray  # (L,) of the Newton step that is tried next
    problem: np.ndarray  # (L,) int64, which one; -1: the lane has no more
    num_iterations: np.ndarray  # (L,) int64, spent on the current problem


def new_lanes(n: int, m: int, num_lanes: int) -> Lanes:
    """Allocate lanes without problems, for n sources and m targets each."""
    return Lanes(
        np.zeros((n, num_lanes)),
        np.zeros((m, num_lanes)),
        np.zeros((n, num_lanes)),
        np.zeros((n, m, num_lanes)),
        np.zeros((m, num_lanes)),
        np.zeros((m, num_lanes)),
        np.ones((m, num_lanes)),
        np.ones((m, num_lanes)),
        np.zeros((m, num_lanes)),
        np.zeros((n, num_lanes)),
        np.zeros((m, m, num_lanes)),
        np.zeros((m, num_lanes)),
        np.zeros(num_lanes),
        np.zeros(num_lanes),
        np.ones(num_lanes),
        np.ones(num_lanes),
        np.ones(num_lanes),
        np.full(num_lanes, -1, np.int64),
        np.zeros(num_lanes, np.int64),
    )
