"""Benchmark of compiling the align kernels: once per machine, later processes load them from numba's cache."""

import os
import subprocess
import sys
import tempfile

from tests.benchmarks.figure import Figure
from tests.benchmarks.measure import say

_PROGRAM = """
import time
import numpy as np
from stages.align.pairing.token_pairing import edit_distance_pairing
from stages.align.transport.sinkhorn import semi_relaxed, sinkhorn
started = time.perf_counter()
one = np.ones((1, 1))
edit_distance_pairing(["a"], ["a"], source_byte_end=np.ones(1), target_byte_end=np.ones(1))
semi_relaxed(np.ones((1, 1, 1)), one, one, epsilon=1.0)
sinkhorn(np.ones((1, 1, 1)), one, one, epsilon=1.0, tolerance=1e-5, max_iterations=1)
print(time.perf_counter() - started)
"""


def compile_seconds() -> list[Figure]:
    """Measure the seconds of a first call of the pairing and transport kernels, without and with numba's cache."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        cold, warm = (
            float(
                subprocess.run(
                    [sys.executable, "-c", _PROGRAM], check=True, stdout=subprocess.PIPE, env=environment
                ).stdout
            )
            for _ in range(2)
        )
    say(f"kernels compiled in {cold:.1f} s, loaded from the cache in {warm:.2f} s")
    return [
        Figure("align.compile_seconds", cold, "s, once per machine", "reported"),
        Figure("align.cached_compile_seconds", warm, "s per worker", "reported"),
    ]
