"""This process's resident memory, from Linux's /proc: a peak that begins anew, and not at that of the parent process."""

import re
from collections.abc import Callable
from pathlib import Path

PROC = Path("/proc/self")


def is_measurable() -> bool:
    """Whether this machine tells."""
    return (PROC / "clear_refs").exists()


def memory_bytes(field: str) -> int:
    """``VmRSS``: what is held now. ``VmHWM``: the most that was held since ``begin_peak``, or since the start."""
    found = re.search(rf"{field}:\s+(\d+) kB", (PROC / "status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def begin_peak() -> None:
    """Let ``VmHWM`` begin at what is held now."""
    (PROC / "clear_refs").write_text("5")


def extra_peak(work: Callable[[], object]) -> int:
    """Bytes that the process held at most during ``work``, beyond what it held before."""
    begin_peak()
    before = memory_bytes("VmRSS")
    work()
    return memory_bytes("VmHWM") - before
