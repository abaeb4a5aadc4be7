"""The cheapest monotone path through a grid of costs, exact, without filling the grid.

Wanted is ``f(k, j) = c(k, j) + min(f(k-1, j-1), f(k-1, j), f(k, j-1))`` at the last cell, and the path that leads there.
Two tokenizations of one text run side by side: most of the grid is far from that path. Which cells are left out is
decided by a proof, not by a width:

1. An *upper bound* U of the optimum f*: the cost of the cheapest path within a corridor where both tokens end near each
   other in the text. It is a path through the grid, so f* <= U.
2. A *lower bound* of what comes after a cell. Rows have prices u >= 0 and columns v >= 0 with u(k) + v(j) <= c(k, j). A
   path from (k, j) to the end has a cell in every later row and in every later column, so these cells cost at least
   ``rest(k, j)``, the prices of all later rows and columns.
3. The recursion goes row by row, each over one interval of columns. After a row, cells with ``f + rest > U`` are cut off
   both ends of its interval. The next interval begins where this one does, and ends one past its end or, by steps along
   the row, at the first cell with ``f + rest > U``.

No cell of an optimal path is left out, and each gets its exact value and step. By induction along an optimal path: its
cell x has ``f + rest <= f* <= U``, so nothing cuts it off. Every predecessor of x that attains the minimum is on an optimal
path too, hence kept with its exact value, and x lies in the interval that is computed from it. Every other
predecessor holds infinity or the cost of some path to it, more than the minimum: it neither wins nor ties. So cost, path
and tie-breaks are those of the full recursion for any costs >= 0; a poor corridor costs only time.
"""

from typing import Final

import numpy as np
from numba import njit

_WIDTH: Final = 24
"""Columns on either side of the corridor's middle: on real text the cheapest path within is the optimum already."""

_DIAGONAL, _SOURCE_STEP, _TARGET_STEP = 0, 1, 2
_INFINITY: Final = 2**62


def cheapest_path(
    distances: np.ndarray,
    source_index: np.ndarray,
    target_index: np.ndarray,
    *,
    source_end: np.ndarray,
    target_end: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Find the cheapest path from the first pair to the last.

    Of equal predecessors the diagonal one is taken, then (k-1, j), then (k, j-1).

    Args:
        distances: (R, C) integers >= 0, the cost of each pair of different texts.
        source_index: (N,) the row of each source token, N >= 1.
        target_index: (M,) the column of each target token, M >= 1.
        source_end: (N,) how far each source token reaches in the text: where the corridor is, and nothing else.
        target_end: (M,) the same of the target; nondecreasing.

    Returns:
        start (M,) and end (M,) int32, the span of source positions that each target position is paired with, and the
        path's cost. Time and memory O(N M) at worst, one byte a cell that is looked at; for two tokenizations of one text
        a small part of the cells.
    """
    row_price, column_price = _prices(distances)
    row_rest = _rest(row_price[source_index])
    column_rest = _rest(column_price[target_index])
    last = len(target_index) - 1
    edge = np.concatenate([[0], np.minimum(np.searchsorted(target_end, source_end[:-1]), last), [last]])
    limit = _corridor_cost(distances, source_index, target_index, np.maximum.accumulate(edge))
    start, end, cost = _bounded_path(distances, source_index, target_index, row_rest, column_rest, limit)
    return start, end, int(cost)


def _prices(distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute prices >= 0 of rows (R,) and columns (C,) such that a row's plus a column's never exceeds the cell's
    cost.
    """
    row_price = distances.min(axis=1)
    return row_price, (distances - row_price[:, None]).min(axis=0)


def _rest(prices: np.ndarray) -> np.ndarray:
    """Return the sum of all prices after each entry."""
    total = np.cumsum(prices, dtype=np.int64)
    return total[-1] - total


@njit(cache=True)
def _corridor_cost(distances: np.ndarray, source_index: np.ndarray, target_index: np.ndarray, edge: np.ndarray) -> int:
    """Compute the cost of the cheapest path that stays within a corridor.

    In row k that is between ``edge[k]`` and ``edge[k + 1]`` (nondecreasing, from the first column to the last) or at most
    ``_WIDTH`` columns outside them. So a path exists: along each row from edge to edge, then down.
    """
    num_source, num_target = len(source_index), len(target_index)
    before = np.full(num_target + 1, _INFINITY)  # f(k-1, j) at j + 1
    here = np.full(num_target + 1, _INFINITY)
    before[0] = 0  # the path begins at (0, 0)
    for k in range(num_source):
        first = max(0, edge[k] - _WIDTH)
        stop = min(num_target, edge[k + 1] + _WIDTH + 1)
        here[first] = left = _INFINITY
        row, columns = distances[source_index[k]], target_index[first:stop]
        above, line = before[first:], here[first + 1 :]
        for i in range(len(columns)):
            left = np.int64(row[columns[i]]) + min(above[i], above[i + 1], left)
            line[i] = left
        before, here = here, before
    return before[num_target]


@njit(cache=True)
def _bounded_path(
    distances: np.ndarray,
    source_index: np.ndarray,
    target_index: np.ndarray,
    row_rest: np.ndarray,
    column_rest: np.ndarray,
    limit: int,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Find the cheapest path and its cost, which is at most ``limit``; the module describes the algorithm."""
    num_source, num_target = len(source_index), len(target_index)
    # The rows' intervals end to end. The whole grid is only reserved: untouched pages use no memory.
    step = np.empty(num_source * num_target, np.uint8)
    origin = np.empty(num_source, np.int64)  # of row k's column 0 in ``step``
    used = 0
    before = np.full(num_target + 2, _INFINITY)  # f(k-1, j) at j + 1; infinite on either side of the interval
    here = np.full(num_target + 2, _INFINITY)
    before[0] = 0  # the path begins at (0, 0)
    first, last = 0, -1
    for k in range(num_source):
        row, allowed = distances[source_index[k]], limit - row_rest[k]
        origin[k] = used - first
        # 1. Columns that the last row's interval reaches, one past its end by a diagonal step.
        stop = min(last + 2, num_target)
        left = _fill(row, target_index[first:stop], before[first:], here[first + 1 :], step[used:])
        # 2. Further columns, which only steps along the row reach.
        while stop < num_target and left + column_rest[stop - 1] <= allowed:
            step[origin[k] + stop] = _TARGET_STEP
            left += row[target_index[stop]]
            stop += 1
            here[stop] = left
        used = origin[k] + stop
        last = stop - 1
        # 3. Cut off the ends that no optimal path passes through.
        while first < last and here[first + 1] + column_rest[first] > allowed:
            first += 1
        while first < last and here[last + 1] + column_rest[last] > allowed:
            last -= 1
        here[first] = here[last + 2] = _INFINITY
        before, here = here, before
    start, end = _spans(step, origin, num_target)
    return start, end, before[num_target]


@njit(cache=True)
def _fill(row: np.ndarray, columns: np.ndarray, above: np.ndarray, line: np.ndarray, step: np.ndarray) -> int:
    """Fill an interval of one row by the recursion and return its last value; ``above`` begins one column before."""
    left = _INFINITY
    for i in range(len(columns)):
        best, move = above[i], _DIAGONAL
        if above[i + 1] < best:
            best, move = above[i + 1], _SOURCE_STEP
        if left < best:
            best, move = left, _TARGET_STEP
        left = np.int64(row[columns[i]]) + best
        line[i] = left
        step[i] = move
    return left


@njit(cache=True)
def _spans(step: np.ndarray, origin: np.ndarray, num_target: int) -> tuple[np.ndarray, np.ndarray]:
    """Follow the steps back from the last pair; row k's are at ``origin[k] + j``."""
    start = np.empty(num_target, np.int32)
    end = np.empty(num_target, np.int32)
    k, j = len(origin) - 1, num_target - 1
    end[j] = k + 1
    while k > 0 or j > 0:
        start[j] = k  # the path goes back, so the last one written is the span's first
        move = step[origin[k] + j]
        if move != _TARGET_STEP:
            k -= 1
        if move != _SOURCE_STEP:
            j -= 1
            end[j] = k + 1
    start[0] = 0
    return start, end
