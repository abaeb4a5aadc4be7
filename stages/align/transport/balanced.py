"""Balanced entropic transport for a batch of small problems, many at a time.

Each lane holds one problem, and every array's last axis runs over lanes, so that a step is a handful of vector
instructions whatever the problem's size; a lane whose problem is solved takes the next one. Lanes never read each other:
a problem's plan does not depend on what it is solved with.

Between two evaluations of an exponential the plan is only ever multiplied, by factors of its columns and of its rows; so
a step needs as many exponentials as there are columns, not as there are entries.
"""

from typing import Final

import numpy as np
from numba import njit

from stages.align.transport.lanes import Lanes, new_lanes

NUM_LANES: Final = 32
"""Wide enough for any vector unit, and little enough that 10 by 10 problems stay in a core's second-level cache."""

_SCALING: Final = 0.25
"""Factor between successive epsilons on the way down: small enough that each dual starts near its solution."""
_STAGE_TOLERANCE: Final = 1e-3
"""Marginal violation, relative to the mass, at which an epsilon larger than the last one is solved well enough."""
_ARMIJO: Final = 1e-4
"""Share of the gain that the slope promises which a step must reach (the sufficient-increase condition)."""
_MIN_ERROR_REDUCTION: Final = 0.8
"""A step that leaves less than this share of the error is accepted without computing the dual, whose digits run out."""
_OVERSHOOT: Final = 1.0
"""A step at whose end the dual falls as steeply as it rose at the beginning went too far."""
_MAX_STEP: Final = 40.0
"""Longest Newton step of a potential, in epsilons: beyond it the quadratic model says nothing."""
_BACKTRACKING_FACTOR: Final = 0.25
"""Factor of the step fraction after a rejected step; an accepted step divides by it again."""
_LARGEST_FACTOR: Final = 1e100
"""Largest factor of a column since the last exponential: beyond it the plan is recomputed, before underflow matters."""
_SMALLEST_EXPONENT: Final = -700.0
"""exp(-700) is about 1e-304, just above the smallest normal float64."""
_TINY: Final = 1e-300

_LOG2_E: Final = 1.4426950408889634
_LN2_HIGH: Final = 0.6931471803691238
_LN2_LOW: Final = 1.9082149292705877e-10
_SHIFT: Final = 1.5 * 2.0**52
"""Added to a number, it leaves the nearest integer in the low bits of the sum."""


def solve_batch(
    cost: np.ndarray, a: np.ndarray, b: np.ndarray, epsilon: float, tolerance: float, max_iterations: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Solve B problems whose arguments were checked; see ``sinkhorn.sinkhorn`` for arguments and results."""
    num_problems, n, m = cost.shape
    return _solve(new_lanes(n, m, min(NUM_LANES, num_problems)), cost, a, b, epsilon, tolerance, max_iterations)


@njit(cache=True)
def _solve(
    lanes: Lanes,
    cost: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    epsilon: float,
    tolerance: float,
    max_iterations: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    num_problems = len(cost)
    num_lanes = len(lanes.problem)
    plan = np.zeros(cost.shape)
    error = np.zeros(num_problems)
    converged = np.ones(num_problems, np.bool_)
    iterations = np.zeros(num_problems, np.int64)
    following = 0
    for lane in range(num_lanes):
        following = _take(lanes, lane, cost, a, b, following, epsilon, tolerance)
    while True:
        # 1. Move each lane on: lower its epsilon, or store its plan and take the next problem.
        is_working = False
        for lane in range(num_lanes):
            while lanes.problem[lane] >= 0:
                # Half of the tolerance: rows and columns are measured again, with rounding, when the plan is stored.
                is_solved = lanes.error[lane] <= 0.5 * lanes.target_error[lane]
                if not is_solved and lanes.num_iterations[lane] < max_iterations:
                    is_working = True
                    break
                if lanes.epsilon[lane] > epsilon:
                    _absorb_factors(lanes, lane)
                    smaller = max(epsilon, _SCALING * lanes.epsilon[lane])
                    _set_epsilon(lanes, lane, cost[lanes.problem[lane]], smaller, epsilon, tolerance)
                    continue
                problem = lanes.problem[lane]
                error[problem] = _put(lanes, lane, plan[problem])
                converged[problem] = error[problem] <= tolerance
                iterations[problem] = lanes.num_iterations[lane]
                following = _take(lanes, lane, cost, a, b, following, epsilon, tolerance)
        if not is_working:
            return plan, error, converged, iterations
        # 2. One iteration in all lanes at once; lanes without a problem are computed too, and ignored.
        _scale_columns(lanes)
        _newton_direction(lanes)
        _try_step(lanes)
        _refresh_overflowing(lanes, cost)


@njit(cache=True)
def _take(
    lanes: Lanes,
    lane: int,
    cost: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    following: int,
    epsilon: float,
    tolerance: float,
) -> int:
    """Give a lane the next problem that has mass; return the index of the one after it."""
    num_problems, n, m = cost.shape
    lanes.problem[lane] = -1
    while following < num_problems and (a[following].max() <= 0 or b[following].max() <= 0):
        following += 1
    if following == num_problems:
        return following
    # Begin with the largest cost between tokens that have mass as epsilon: there the dual is smooth, and Newton's steps long.
    largest = epsilon
    for x in range(n):
        lanes.a[x, lane] = a[following, x]
        lanes.inverse_a[x, lane] = 1.0 / a[following, x] if a[following, x] > 0 else 0.0
        for y in range(m):
            if a[following, x] > 0 and b[following, y] > 0:
                largest = max(largest, cost[following, x, y])
    for y in range(m):
        lanes.b[y, lane] = b[following, y]
        lanes.potential[y, lane] = 0.0
        lanes.factor[y, lane] = 1.0
    lanes.problem[lane] = following
    lanes.num_iterations[lane] = 0
    _set_epsilon(lanes, lane, cost[following], largest, epsilon, tolerance)
    return following + 1


@njit(cache=True)
def _set_epsilon(lanes: Lanes, lane: int, cost: np.ndarray, current: float, last: float, tolerance: float) -> None:
    mass = 0.0
    for x in range(len(lanes.a)):
        mass += lanes.a[x, lane]
    lanes.epsilon[lane] = current
    lanes.target_error[lane] = tolerance if current <= last else max(tolerance, _STAGE_TOLERANCE * mass)
    lanes.step_fraction[lane] = 1.0
    _evaluate(lanes, lane, cost)


@njit(cache=True)
def _absorb_factors(lanes: Lanes, lane: int) -> None:
    # The rows' factors need no place: _evaluate makes the rows exact whatever the columns' potentials are.
    for y in range(len(lanes.b)):
        lanes.potential[y, lane] += lanes.epsilon[lane] * np.log(lanes.factor[y, lane])
        lanes.factor[y, lane] = 1.0


@njit(cache=True)
def _evaluate(lanes: Lanes, lane: int, cost: np.ndarray) -> None:
    """Recompute a lane's plan from its potentials, with exact rows, column sums and error."""
    n, m = len(lanes.a), len(lanes.b)
    inverse = 1.0 / lanes.epsilon[lane]
    exponents = np.empty(n * m)
    for x in range(n):
        largest = -np.inf
        for y in range(m):
            exponent = (lanes.potential[y, lane] - cost[x, y]) * inverse
            exponents[x * m + y] = exponent
            if lanes.b[y, lane] > 0:
                largest = max(largest, exponent)
        # Shift by the row's largest exponent, so that a row never underflows to zeros.
        for y in range(m):
            exponents[x * m + y] -= largest
    weights = _exponential(exponents)
    for y in range(m):
        lanes.columns[y, lane] = 0.0
    for x in range(n):
        total = 0.0
        for y in range(m):
            if lanes.b[y, lane] > 0:
                total += weights[x * m + y]
        scale = lanes.a[x, lane] / total
        for y in range(m):
            entry = weights[x * m + y] * scale if lanes.b[y, lane] > 0 else 0.0
            lanes.plan[x, y, lane] = entry
            lanes.columns[y, lane] += entry
    error = 0.0
    for y in range(m):
        error = max(error, abs(lanes.columns[y, lane] - lanes.b[y, lane]))
    lanes.error[lane] = error


@njit(cache=True)
def _exponential(exponents: np.ndarray) -> np.ndarray:
    """Compute the exponential of each number to two units in the last place, in vector instructions.

    numba would call libm once per number. Numbers are at most 700; below -700 the result is exp(-700).

    Numbers are at most 700; below -700 the result is exp(-700).
    """
    size = len(exponents)
    scale = np.empty(size)
    bits = scale.view(np.int64)
    power = np.empty(size)
    for i in range(size):
        value = max(exponents[i], _SMALLEST_EXPONENT)
        shifted = value * _LOG2_E + _SHIFT
        scale[i] = shifted
        whole = shifted - _SHIFT
        # exp(value) = 2^whole exp(r) with |r| <= ln(2) / 2; ln 2 in two parts keeps the digits of r.
        r = (value - whole * _LN2_HIGH) - whole * _LN2_LOW
        # Taylor series of exp(r) to r^13 / 13!, by Horner's rule.
        p = 1.0 / 6227020800.0
        p = p * r + 1.0 / 479001600.0
        p = p * r + 1.0 / 39916800.0
        p = p * r + 1.0 / 3628800.0
        p = p * r + 1.0 / 362880.0
        p = p * r + 1.0 / 40320.0
        p = p * r + 1.0 / 5040.0
        p = p * r + 1.0 / 720.0
        p = p * r + 1.0 / 120.0
        p = p * r + 1.0 / 24.0
        p = p * r + 1.0 / 6.0
        p = p * r + 0.5
        p = p * r + 1.0
        power[i] = p * r + 1.0
    for i in range(size):
        # The integer in the low bits becomes the exponent of a power of two; 1023 is the exponent's bias.
        bits[i] = (bits[i] << 52) + (1023 << 52)
    for i in range(size):
        power[i] *= scale[i]
    return power


@njit(cache=True)
def _put(lanes: Lanes, lane: int, plan: np.ndarray) -> float:
    """Write a lane's plan; return the largest violation of a marginal."""
    n, m = plan.shape
    error = 0.0
    for x in range(n):
        total = 0.0
        for y in range(m):
            plan[x, y] = lanes.plan[x, y, lane]
            total += plan[x, y]
        error = max(error, abs(total - lanes.a[x, lane]))
    for y in range(m):
        total = 0.0
        for x in range(n):
            total += plan[x, y]
        error = max(error, abs(total - lanes.b[y, lane]))
    return error


@njit(cache=True)
def _scale_columns(lanes: Lanes) -> None:
    """Run one Sinkhorn iteration in every lane.

    It never lowers the dual, and sets right the columns that are wrong by orders of magnitude, for which Newton's
    quadratic model would shorten everybody's step.
    """
    m, num_lanes = lanes.b.shape
    for y in range(m):
        for i in range(num_lanes):
            b = lanes.b[y, i]
            ratio = min(b / max(lanes.columns[y, i], _TINY), _LARGEST_FACTOR)
            lanes.trial[y, i] = ratio if b > 0 else 1.0
    _evaluate_trial(lanes)
    _accept_trial(lanes)
    for i in range(num_lanes):
        lanes.error[i] = lanes.trial_error[i]
        lanes.num_iterations[i] += 1


@njit(cache=True)
def _evaluate_trial(lanes: Lanes) -> None:
    """Evaluate columns multiplied by ``trial``: the rows' rescaling, the column sums and the error."""
    n, m, num_lanes = lanes.plan.shape
    plan, trial, row_scale, trial_columns = lanes.plan, lanes.trial, lanes.row_scale, lanes.trial_columns
    row_scale[:] = 0.0
    trial_columns[:] = 0.0
    for x in range(n):
        for y in range(m):
            for i in range(num_lanes):
                row_scale[x, i] += plan[x, y, i] * trial[y, i]
        for i in range(num_lanes):
            row_scale[x, i] = lanes.a[x, i] / max(row_scale[x, i], _TINY)
        for y in range(m):
            for i in range(num_lanes):
                trial_columns[y, i] += plan[x, y, i] * row_scale[x, i]
    lanes.trial_error[:] = 0.0
    for y in range(m):
        for i in range(num_lanes):
            trial_columns[y, i] *= trial[y, i]
            lanes.trial_error[i] = max(lanes.trial_error[i], abs(trial_columns[y, i] - lanes.b[y, i]))


@njit(cache=True)
def _accept_trial(lanes: Lanes) -> None:
    n, m, num_lanes = lanes.plan.shape
    plan, trial, row_scale = lanes.plan, lanes.trial, lanes.row_scale
    for x in range(n):
        for y in range(m):
            for i in range(num_lanes):
                plan[x, y, i] *= trial[y, i] * row_scale[x, i]
    for y in range(m):
        for i in range(num_lanes):
            lanes.factor[y, i] *= trial[y, i]
            lanes.columns[y, i] = lanes.trial_columns[y, i]


@njit(cache=True)
def _newton_direction(lanes: Lanes) -> None:
    """Compute the Newton step of the column potentials, in epsilons, with one column of each connected part pinned.

    The dual's Hessian is minus the Laplacian of the graph in which two columns are as near as the rows that they share.
    """
    n, m, num_lanes = lanes.plan.shape
    plan, weights = lanes.plan, lanes.laplacian
    share = np.empty(num_lanes)
    weights[:] = 0.0
    # weights[z, y] = sum over x of plan[x, z] plan[x, y] / a[x], for z < y: O(n m^2) per problem.
    for x in range(n):
        for y in range(m):
            for i in range(num_lanes):
                share[i] = plan[x, y, i] * lanes.inverse_a[x, i]
            for z in range(y):
                for i in range(num_lanes):
                    weights[z, y, i] += share[i] * plan[x, z, i]
    # The gradient of the dual: how much each column's sum falls short of its marginal.
    for y in range(m):
        for i in range(num_lanes):
            lanes.direction[y, i] = lanes.b[y, i] - lanes.columns[y, i]
    _solve_laplacians(weights, lanes.direction)


@njit(cache=True)
def _solve_laplacians(weights: np.ndarray, values: np.ndarray) -> None:
    """Solve L x = values in place for the Laplacian of each lane's graph.

    Only the weights above the diagonal are used, all positive: each pivot is summed from what is left of its row, so
    nothing is ever subtracted, and links of 1e-13 next to links of 1 keep their digits (Grassmann, Taksar and Heyman's
    elimination). Such weak links are the rule at small epsilon.

    Args:
        weights: (m, m, L) links; overwritten.
        values: (m, L); x afterwards. Of each connected part the last x is 0.
    """
    m, num_lanes = values.shape
    inverse_degree = np.empty(num_lanes)
    share = np.empty(num_lanes)
    for pivot in range(m):
        _inverse_degree(weights[pivot, pivot + 1 :], inverse_degree)
        for y in range(pivot + 1, m):
            for i in range(num_lanes):
                share[i] = weights[pivot, y, i] * inverse_degree[i]
                values[y, i] += share[i] * values[pivot, i]
            for z in range(y + 1, m):
                for i in range(num_lanes):
                    weights[y, z, i] += share[i] * weights[pivot, z, i]
        for z in range(pivot + 1, m):
            for i in range(num_lanes):
                weights[pivot, z, i] *= inverse_degree[i]
        for i in range(num_lanes):
            values[pivot, i] *= inverse_degree[i]
    for pivot in range(m - 2, -1, -1):
        for z in range(pivot + 1, m):
            for i in range(num_lanes):
                values[pivot, i] += weights[pivot, z, i] * values[z, i]


@njit(cache=True)
def _inverse_degree(links: np.ndarray, inverse: np.ndarray) -> None:
    inverse[:] = 0.0
    for z in range(len(links)):
        for i in range(len(inverse)):
            inverse[i] += links[z, i]
    for i in range(len(inverse)):
        # 0: isolated node without remaining links, so its potential is pinned at 0.
        inverse[i] = 1.0 / inverse[i] if inverse[i] > _TINY else 0.0


@njit(cache=True)
def _try_step(lanes: Lanes) -> None:
    """Take a fraction of the Newton step if it reduces the error or raises the dual; else try a smaller one next time."""
    n, m, num_lanes = lanes.plan.shape
    # 1. Limit the step's length, and evaluate the step.
    longest = np.zeros(num_lanes)
    for y in range(m):
        for i in range(num_lanes):
            longest[i] = max(longest[i], abs(lanes.direction[y, i]))
    step = np.empty(num_lanes)
    for i in range(num_lanes):
        step[i] = min(lanes.step_fraction[i], _MAX_STEP / max(longest[i], _TINY))
    for y in range(m):
        for i in range(num_lanes):
            lanes.trial[y, i] = step[i] * lanes.direction[y, i]
    lanes.trial[:] = _exponential(lanes.trial.ravel()).reshape(m, num_lanes)
    _evaluate_trial(lanes)
    # 2. Slopes of the dual along the direction, at the step's beginning and at its end.
    slope = np.zeros(num_lanes)
    end_slope = np.zeros(num_lanes)
    for y in range(m):
        for i in range(num_lanes):
            slope[i] += lanes.direction[y, i] * (lanes.b[y, i] - lanes.columns[y, i])
            end_slope[i] += lanes.direction[y, i] * (lanes.b[y, i] - lanes.trial_columns[y, i])
    # 3. Accept or reject the step in each lane.
    for i in range(num_lanes):
        # The dual is concave: where it still rises at the end, it rose all the way.
        is_better = lanes.trial_error[i] < _MIN_ERROR_REDUCTION * lanes.error[i] or end_slope[i] >= 0.0
        # The dual itself costs one logarithm per row, so it is computed for the undecided steps only.
        if not is_better and end_slope[i] > -_OVERSHOOT * slope[i]:
            is_better = _gain(lanes, i, step[i]) >= _ARMIJO * step[i] * slope[i]
        if lanes.error[i] > 0.5 * lanes.target_error[i] and is_better:
            lanes.error[i] = lanes.trial_error[i]
            lanes.step_fraction[i] = min(1.0, lanes.step_fraction[i] / _BACKTRACKING_FACTOR)
            continue
        # A rejected step becomes the identity, so that one _accept_trial serves all lanes.
        lanes.step_fraction[i] *= _BACKTRACKING_FACTOR
        for y in range(m):
            lanes.trial[y, i] = 1.0
            lanes.trial_columns[y, i] = lanes.columns[y, i]
        for x in range(n):
            lanes.row_scale[x, i] = 1.0
    _accept_trial(lanes)


@njit(cache=True)
def _gain(lanes: Lanes, lane: int, step: float) -> float:
    """Compute how much a step raises a lane's dual, in epsilons."""
    gain = 0.0
    for y in range(len(lanes.b)):
        gain += step * lanes.direction[y, lane] * lanes.b[y, lane]
    for x in range(len(lanes.a)):
        if lanes.a[x, lane] > 0:
            gain += lanes.a[x, lane] * np.log(lanes.row_scale[x, lane])
    return gain


@njit(cache=True)
def _refresh_overflowing(lanes: Lanes, cost: np.ndarray) -> None:
    """Recompute a lane's plan from its potentials before its factors leave the range of floating-point numbers."""
    m, num_lanes = lanes.factor.shape
    for i in range(num_lanes):
        if lanes.problem[i] < 0:
            continue
        for y in range(m):
            if not 1.0 / _LARGEST_FACTOR < lanes.factor[y, i] < _LARGEST_FACTOR:
                _absorb_factors(lanes, i)
                _evaluate(lanes, i, cost[lanes.problem[i]])
                break
