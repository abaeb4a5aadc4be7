"""Entropic optimal transport between candidate lists: balanced, or with only the source's marginal as a constraint."""

from typing import Any, Final, NamedTuple

import numpy as np
from numba import njit

from stages.align.transport.balanced import solve_batch

__all__ = ["SinkhornResult", "semi_relaxed", "sinkhorn"]

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
        a: source marginals, (B, n); >= 0, zeros allowed, a problem of only zeros gives a plan of zeros.
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
    return SinkhornResult(*solve_batch(cost, a, b, epsilon, tolerance, max_iterations))


def semi_relaxed(cost: np.ndarray, a: np.ndarray, b: np.ndarray, *, epsilon: float) -> np.ndarray:
    """Solve transport in which only the source marginal binds and b is a prior, in closed form.

    ``plan[x, y] = a[x] b[y] exp(-cost[x, y] / epsilon) / sum_y' (same)``; the exponent is taken from the row's least cost
    among columns with a prior, so that no row underflows.

    Args:
        cost: (B, n, m), finite, >= 0.
        a: source marginals, (B, n); >= 0; the plan's row sums.
        b: prior over the target candidates, (B, m); >= 0, need not sum to 1.
        epsilon: entropic regularisation, in units of cost.

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
            # The cheapest column with a prior gets exponent 0, so the row's total is at least its prior.
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
