"""Peak memory of this process: resident memory from Linux's /proc, with a peak that can be reset, and allocated memory."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from stages.models.devices import resident_bytes

PROC = Path("/proc/self")


def is_measurable() -> bool:
    """Return whether this machine can reset the peak of resident memory."""
    return (PROC / "clear_refs").exists()


def begin_peak() -> None:
    """Reset the peak (``VmHWM``) to the current resident memory."""
    (PROC / "clear_refs").write_text("5")


def extra_peak(work: Callable[[], object]) -> int:
    """Return the peak of resident memory during ``work``, in bytes beyond the memory before."""
    begin_peak()
    before = resident_bytes("VmRSS")
    work()
    return resident_bytes("VmHWM") - before


def allocated_peak(work: Callable[[], object]) -> int:
    """Return the peak of bytes allocated by Python, numpy and Arrow during ``work``, including those kept for reuse.

    Resident memory would miss allocations that fit into pages freed before. The peaks of Python and Arrow may not coincide,
    so their sum is an upper bound.
    """
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        result = work()
        _, peak = tracemalloc.get_traced_memory()
        del result
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    return peak + (pool.max_memory() or 0)
