"""This process's resident memory, from Linux's /proc: a peak that begins anew, and not at that of the parent process."""

from collections.abc import Callable
from pathlib import Path

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
