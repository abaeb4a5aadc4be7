"""This process's memory: resident, from Linux's /proc, with a peak that begins anew; and as numpy and Arrow allocate it."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from stages.models.devices import resident_bytes

PROC = Path("/proc/self")


def is_measurable() -> bool:
    """Whether this machine tells."""
    return (PROC / "clear_refs").exists()


def begin_peak() -> None:
    """Let the peak (``VmHWM``) begin at what is held now."""
    (PROC / "clear_refs").write_text("5")


def extra_peak(work: Callable[[], object]) -> int:
    """Bytes that the process held at most during ``work``, beyond what it held before."""
    begin_peak()
    before = resident_bytes("VmRSS")
    work()
    return resident_bytes("VmHWM") - before


def allocated_peak(work: Callable[[], object]) -> int:
    """Bytes that Python, numpy and Arrow allocated at most during ``work``; what an allocator kept for reuse counts too.

    Resident memory would miss what fits into pages that were freed before. The two peaks may not coincide: their sum is
    an upper bound.
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
