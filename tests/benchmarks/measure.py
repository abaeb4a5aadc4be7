"""How a benchmark measures: one core, medians, real data or a stated reason for its absence."""

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
    """A line for people."""
    sys.stderr.write(f"  {text}\n")
    sys.stderr.flush()


def say_versions() -> None:
    """What was measured with what, and how busy the machine was."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    say(f"Python {platform.python_version()}, {versions}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Everything in this process, every library's threads too, on one core."""
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
    """Median CPU time of ``work`` after one warm call: on a shared machine other programs do not count."""
    work()
    return statistics.median(_timed(work, time.process_time) for _ in range(rounds))


def _timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    started = clock()
    work()
    return clock() - started
