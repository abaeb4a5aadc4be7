"""Measurement helpers of the benchmarks: one core, medians, and a stated reason when data is missing."""

import contextlib
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROUNDS = 5
LIBRARIES = ("numpy", "numba", "rapidfuzz", "POT", "pyarrow", "tokenizers", "torch", "transformers")


class SkippedError(Exception):
    """A benchmark cannot run here; the message says what to do."""


def say(text: str) -> None:
    """Print a line for people on standard error."""
    sys.stderr.write(f"  {text}\n")
    sys.stderr.flush()


def say_versions() -> None:
    """Print the library versions, and the load of the machine."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    say(f"Python {platform.python_version()}, {versions}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Pin all threads of this process, including those of libraries, to one core."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    _pin({max(before)})
    try:
        yield
    finally:
        _pin(before)


def _pin(cores: set[int]) -> None:
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # a thread may end meanwhile
            os.sched_setaffinity(int(thread.name), cores)


def cpu_seconds(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return the median CPU time of ``work`` after one warm-up call; it excludes other programs on a shared machine."""
    work()
    return statistics.median(_timed(work, time.process_time) for _ in range(rounds))


def _timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    started = clock()
    work()
    return clock() - started
