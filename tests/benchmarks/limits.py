"""What the hardware would allow: operations and bytes a token over what this core does of them."""

import numpy as np
from numba import njit

from tests.benchmarks.measure import cpu_seconds, say

_REPEATS = 20_000


def say_limit(measured_us: float, iterations: float, k: int) -> None:
    """Tell the least time a token of the ``paper`` preset, and how far from it the stage is.

    The pairing adds nothing to speak of: a proof leaves out most of its cells, and a path has two cells a token.

    Args:
        measured_us: the stage's time a target token.
        iterations: mean Newton iterations a transport problem.
        k: candidates on each side.
    """
    rate, bandwidth = _flops_per_second(), _bytes_per_second()
    # Two evaluations (4 k^2 each) and two updates of the plan (2 k^2), the Laplacian (k^3), its elimination (2/3 k^3).
    flops = iterations * (12 * k**2 + 5 / 3 * k**3)
    num_bytes = 3 * 8 * k + 2 * 8 * k**2  # ids and logprobs read twice and written once, costs, plan
    sinkhorn_us, bytes_us = flops / rate * 1e6, num_bytes / bandwidth * 1e6
    limit = sinkhorn_us + bytes_us
    say(
        f"limit: this core does {rate / 1e9:.1f} G double multiply-adds' operations/s in its cache and copies "
        f"{bandwidth / 1e9:.1f} GB/s"
    )
    say(
        f"limit: {flops / 1e3:.0f} k operations of Sinkhorn {sinkhorn_us:.2f} us, {num_bytes / 1e3:.1f} kB {bytes_us:.2f} us"
    )
    say(f"limit: {limit:.2f} us a token; measured {measured_us:.1f} us, {measured_us / limit:.1f} times that")


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
