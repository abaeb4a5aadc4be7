"""Entropic optimal transport between candidate lists: balanced, and with the source's marginal alone."""

from typing import Any, Final, NamedTuple

import numpy as np
from numba import njit

_SCALING: Final = 0.35
"""Factor between successive epsilons on the way down: small enough that each dual starts near its solution."""
_STAGE_TOLERANCE: Final = 1e-3
"""Marginal violation at which a larger epsilon has done its work, relative to the mass."""
_ARMIJO: Final = 1e-4
_MAX_HALVINGS: Final = 12
_MAX_STEP: Final = 40.0
"""Longest Newton step of a potential, in epsilons: beyond it the quadratic model says nothing."""
_MAX_RISE: Final = 400.0
"""Largest rise of a potential by column scaling, in epsilons: a column that underflowed to zero gives no ratio."""
_MASS_TOLERANCE: Final = 1e-6


class SinkhornResult(NamedTuple):
    """Solutions of a batch of B problems.

    Attributes:
        plan: (B, n, m) float64.
        marginal_error: (B,) largest violation of a row's or a column's marginal.
        converged: (B,) bool, the error is within the tolerance.
        iterations: (B,) int64, over all epsilons on the way down.
    """

    plan: np.ndarray
    marginal_error: np.ndarray
    converged: np.ndarray
    iterations: np.ndarray


def sinkhorn(
    cost: np.ndarray, a: np.ndarray, b: np.ndarray, *, epsilon: float, tolerance: float, max_iterations: int
) -> SinkhornResult:
    """Solve a batch of entropic transport problems: ``min <plan, cost> - epsilon entropy(plan)`` with both marginals.

    The plan is Sinkhorn's, ``diag(u) exp(-cost / epsilon) diag(v)``, in the log domain. Plain scaling of rows and columns
    needs tens of thousands of iterations where edits cost 1 and epsilon is 1/30, because potentials creep; here an
    iteration scales columns and rows and then takes a Newton step on the columns' potentials where that raises the dual
    (concave, with as many variables as columns). Epsilon comes down from the largest cost in a few steps.

    Args:
        cost: (B, n, m), finite, >= 0.
        a: source marginals, (B, n); >= 0, zeros allowed, a problem of zeros alone gives a plan of zeros.
        b: target marginals, (B, m); each row has the sum of a's.
        epsilon: entropic regularisation, in units of cost.
        tolerance: largest marginal violation at which a problem is solved.
        max_iterations: cap on iterations of one problem.

    Raises:
        ValueError: a shape or a marginal does not fit; says which problem.

    Source: PTA-LLM, "Sinkhorn algorithm"; Cuturi 2013; Newton on the semi-dual: Brauer et al. 2017.
    """
    cost, a, b = _checked(cost, a, b)
    _check_positive(epsilon=epsilon, tolerance=tolerance, max_iterations=max_iterations)
    difference = np.abs(a.sum(axis=1) - b.sum(axis=1))
    _refuse(
        difference > _MASS_TOLERANCE * np.maximum(a.sum(axis=1), b.sum(axis=1)),
        "the marginals' sums differ by more than 1e-6; rescale one of them",
    )
    return SinkhornResult(*_solve_batch(cost, a, b, epsilon, tolerance, max_iterations))


def semi_relaxed(cost: np.ndarray, a: np.ndarray, b: np.ndarray, *, epsilon: float) -> np.ndarray:
    """Transport in which only the source marginal binds and b is a prior; closed form.

    ``plan[x, y] = a[x] b[y] exp(-cost[x, y] / epsilon) / sum_y' (same)``; the exponent is taken from the row's least cost
    among columns with a prior, so that no row underflows.

    Args:
        cost: (B, n, m), finite, >= 0.
        a: source marginals, (B, n); >= 0; the plan's row sums.
        b: prior over the target candidates, (B, m); >= 0, need not sum to 1.
        epsilon: in units of cost.

    Returns:
        plan, (B, n, m) float64.

    Raises:
        ValueError: a shape or a marginal does not fit (mass without any prior among them); says which problem.
    """
    cost, a, b = _checked(cost, a, b)
    _check_positive(epsilon=epsilon)
    _refuse((a.sum(axis=1) > 0) & (b.sum(axis=1) <= 0), "the source has mass, the prior has none")
    return _semi_relaxed_batch(cost, a, b, epsilon)


def _checked(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if cost.ndim != 3 or a.shape != cost.shape[:2] or b.shape != (cost.shape[0], cost.shape[2]):
        raise ValueError(
            f"cost {cost.shape}, a {a.shape}, b {b.shape}: expected cost (B, n, m), a (B, n), b (B, m) of the same B, n, m"
        )
    cost, a, b = (np.ascontiguousarray(array, np.float64) for array in (cost, a, b))
    _refuse(~np.isfinite(cost).all(axis=(1, 2)) | (cost < 0).any(axis=(1, 2)), "a cost is negative or not finite")
    for name, marginal in (("a", a), ("b", b)):
        _refuse(~np.isfinite(marginal).all(axis=1) | (marginal < 0).any(axis=1), f"{name} is negative or not finite")
    return cost, a, b


def _refuse(bad: Any, message: str) -> None:
    if bad.any():
        raise ValueError(f"transport problem {int(np.argmax(bad))} of {len(bad)}: {message}")


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} = {value}: expected a number above 0")


@njit(cache=True)
def _semi_relaxed_batch(cost: np.ndarray, a: np.ndarray, b: np.ndarray, epsilon: float) -> np.ndarray:
    plan = np.zeros(cost.shape)
    num_problems, n, m = cost.shape
    for problem in range(num_problems):
        for x in range(n):
            mass = a[problem, x]
            if mass == 0:
                continue
            least = np.inf
            for y in range(m):
                if b[problem, y] > 0 and cost[problem, x, y] < least:
                    least = cost[problem, x, y]
            total = 0.0
            for y in range(m):
                if b[problem, y] > 0:
                    weight = b[problem, y] * np.exp((least - cost[problem, x, y]) / epsilon)
                    plan[problem, x, y] = weight
                    total += weight
            for y in range(m):
                plan[problem, x, y] *= mass / total
    return plan


@njit(cache=True)
def _solve_batch(
    cost: np.ndarray, a: np.ndarray, b: np.ndarray, epsilon: float, tolerance: float, max_iterations: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    num_problems = len(cost)
    plan = np.zeros(cost.shape)
    error = np.zeros(num_problems)
    converged = np.ones(num_problems, np.bool_)
    iterations = np.zeros(num_problems, np.int64)
    for problem in range(num_problems):
        rows = np.flatnonzero(a[problem])  # only what has mass takes part: no logarithm of zero
        columns = np.flatnonzero(b[problem])
        if len(rows) == 0 or len(columns) == 0:
            continue
        part = np.empty((len(rows), len(columns)))
        for i in range(len(rows)):
            for j in range(len(columns)):
                part[i, j] = cost[problem, rows[i], columns[j]]
        solved, iterations[problem] = _solve(
            part, a[problem][rows], b[problem][columns], epsilon, tolerance, max_iterations
        )
        for i in range(len(rows)):
            for j in range(len(columns)):
                plan[problem, rows[i], columns[j]] = solved[i, j]
        error[problem] = max(
            np.abs(plan[problem].sum(axis=1) - a[problem]).max(), np.abs(plan[problem].sum(axis=0) - b[problem]).max()
        )
        converged[problem] = error[problem] <= tolerance
    return plan, error, converged, iterations


@njit(cache=True)
def _solve(
    cost: np.ndarray, a: np.ndarray, b: np.ndarray, epsilon: float, tolerance: float, max_iterations: int
) -> tuple[np.ndarray, int]:
    """One problem without zeros in its marginals: the plan, rows exact, and the iterations used."""
    n, m = cost.shape
    plan = np.empty((n, m))
    trial_plan = np.empty((n, m))
    columns = np.empty(m)
    trial_columns = np.empty(m)
    potential = np.zeros(m)  # of the columns, in units of cost
    trial = np.empty(m)
    direction = np.empty(m)
    hessian = np.empty((m, m))
    mass = a.sum()
    used = 0
    current = max(epsilon, cost.max())
    while True:
        is_final = current <= epsilon
        goal = tolerance if is_final else max(tolerance, _STAGE_TOLERANCE * mass)
        dual = _rescale_rows(cost, a, b, potential, current, plan, columns)
        while used < max_iterations:
            error = np.abs(columns - b).max()
            # Rounding leaves a little in the row sums too: aim below the tolerance that is checked afterwards.
            if error <= 0.5 * goal:
                break
            used += 1
            # A column scaling first: it never lowers the dual, and sets right the columns that are wrong by orders of
            # magnitude, for which Newton's quadratic model would shorten everybody's step.
            for y in range(m):
                rise = np.log(b[y] / columns[y]) if columns[y] > 0 else _MAX_RISE
                potential[y] += current * min(rise, _MAX_RISE)
            dual = _rescale_rows(cost, a, b, potential, current, plan, columns)
            error = np.abs(columns - b).max()
            if error <= 0.5 * goal or not _newton_direction(plan, columns, a, b, hessian, direction):
                continue
            slope = (direction * (b - columns)).sum()
            size = min(1.0, _MAX_STEP / max(np.abs(direction).max(), 1e-300))
            for _ in range(_MAX_HALVINGS):
                for y in range(m):
                    trial[y] = potential[y] + size * current * direction[y]
                trial_dual = _rescale_rows(cost, a, b, trial, current, trial_plan, trial_columns)
                is_closer = np.abs(trial_columns - b).max() < 0.25 * error  # near the end the dual's digits run out
                if is_closer or trial_dual >= dual + _ARMIJO * size * current * slope:
                    potential, trial = trial, potential
                    plan, trial_plan = trial_plan, plan
                    columns, trial_columns = trial_columns, columns
                    break
                size *= 0.5
        if is_final:
            return plan, used
        current = max(epsilon, _SCALING * current)


@njit(cache=True)
def _rescale_rows(
    cost: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    potential: np.ndarray,
    epsilon: float,
    plan: np.ndarray,
    columns: np.ndarray,
) -> float:
    """Write the plan whose rows are exact for these column potentials, and its column sums; return the dual's value."""
    n, m = cost.shape
    dual = 0.0
    for y in range(m):
        columns[y] = 0.0
        dual += potential[y] * b[y]
    inverse = 1.0 / epsilon
    for x in range(n):
        largest = -np.inf
        for y in range(m):
            exponent = (potential[y] - cost[x, y]) * inverse
            plan[x, y] = exponent
            largest = max(largest, exponent)
        total = 0.0
        for y in range(m):
            weight = np.exp(plan[x, y] - largest)
            plan[x, y] = weight
            total += weight
        scale = a[x] / total
        for y in range(m):
            plan[x, y] *= scale
            columns[y] += plan[x, y]
        dual += epsilon * a[x] * (np.log(scale) - largest)
    return dual


@njit(cache=True)
def _newton_direction(
    plan: np.ndarray, columns: np.ndarray, a: np.ndarray, b: np.ndarray, laplacian: np.ndarray, direction: np.ndarray
) -> bool:
    """Newton's step of the column potentials, in epsilons, with the last one held; False if it cannot be had.

    The dual's Hessian is minus the Laplacian of the graph in which two columns are as near as the rows that they share.
    """
    n, m = plan.shape
    laplacian[:] = 0.0
    for x in range(n):
        for y in range(m):
            share = plan[x, y] / a[x]
            if share > 0:
                for z in range(y):
                    laplacian[y, z] += share * plan[x, z]
    for y in range(m):
        direction[y] = b[y] - columns[y]
        for z in range(y):
            laplacian[z, y] = laplacian[y, z]
    return _solve_laplacian(laplacian, direction)


@njit(cache=True)
def _solve_laplacian(weights: np.ndarray, values: np.ndarray) -> bool:
    """Solve L x = values in place for a graph's Laplacian, x[-1] = 0; False if the graph falls apart.

    Only the off-diagonal entries are used, as positive weights: each pivot is summed from what is left of its row, so
    nothing is ever subtracted, and links of 1e-13 beside links of 1 keep their digits (Grassmann, Taksar and Heyman's
    elimination). Such weak links are the rule at small epsilon.
    """
    m = len(values)
    for pivot in range(m - 1):
        degree = 0.0
        for z in range(pivot + 1, m):
            degree += weights[pivot, z]
        if degree <= 0:
            return False
        weights[pivot, pivot] = degree
        for y in range(pivot + 1, m):
            factor = weights[y, pivot] / degree
            if factor > 0:
                values[y] += factor * values[pivot]
                for z in range(pivot + 1, m):
                    weights[y, z] += factor * weights[pivot, z]
    values[m - 1] = 0.0
    for pivot in range(m - 2, -1, -1):
        value = values[pivot]
        for z in range(pivot + 1, m):
            value += weights[pivot, z] * values[z]
        values[pivot] = value / weights[pivot, pivot]
    return True
