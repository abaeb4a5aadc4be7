"""Hardware limit of alignment: operations and bytes per token, divided by this core's rates."""

import numpy as np
from numba import njit

from tests.benchmarks.measure import cpu_seconds, say

_REPEATS = 20_000


def say_limit(measured_us: float, iterations: float, k: int) -> None:
    """Print the least possible time per token of the ``paper`` preset, and the stage's multiple of it.

    The cost of the pairing is negligible: bounds exclude most of its cells, and a path has two cells per token.

    Args:
        measured_us: time of the stage per target token, in microseconds.
        iterations: mean number of Newton iterations per transport problem.
        k: candidates on each side.
    """
    rate, bandwidth = _flops_per_second(), _bytes_per_second()
    # Two evaluations (4 k^2 each) and two updates of the plan (2 k^2), the Laplacian (k^3), its elimination (2/3 k^3).
    flops = iterations * (12 * k**2 + 5 / 3 * k**3)
    num_bytes = 3 * 8 * k + 2 * 8 * k**2  # ids and logprobs read twice and written once, costs, plan
    sinkhorn_us, bytes_us = flops / rate * 1e6, num_bytes / bandwidth * 1e6
    limit = sinkhorn_us + bytes_us
    say(
        f"limit: this core computes {rate / 1e9:.1f} GFLOP/s (double multiply-adds in cache) and copies "
        f"{bandwidth / 1e9:.1f} GB/s"
    )
    say(
        f"limit per token: {flops / 1e3:.0f} kFLOP of Sinkhorn take {sinkhorn_us:.2f} us, {num_bytes / 1e3:.1f} kB take "
        f"{bytes_us:.2f} us"
    )
    say(f"limit: {limit:.2f} us per token; measured {measured_us:.1f} us, {measured_us / limit:.1f} times the limit")


def _flops_per_second() -> float:
    x, y, z = (np.random.default_rng(0).random(512) for _ in range(3))
    return 2 * _REPEATS * 512 / cpu_seconds(lambda: _multiply_add(x, y, z))


@njit(cache=True)
def _multiply_add(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> None:
    for _ in range(_REPEATS):
        for i in range(len(x)):
            z[i] += x[i] * y[i]


def _bytes_per_second() -> float:
    source = np.ones(2**25)
    target = np.empty_like(source)
    return 2 * source.nbytes / cpu_seconds(lambda: np.copyto(target, source))
