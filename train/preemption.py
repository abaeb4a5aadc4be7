"""Detect that a job is about to lose its machine, so that it can save its work."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType


class Notice(IntEnum):
    """Request that a worker received."""

    NONE = 0
    SAVE = 1
    """A machine will go: write a checkpoint, train on until it does."""
    STOP = 2
    """Write a checkpoint, then stop."""


Watch = Callable[[], Notice]
"""Asked once after each optimizer step by every worker; the most urgent answer counts for all."""


class StoppedError(RuntimeError):
    """Raised when a job was told to stop and its checkpoint is written; a new start continues with the next block."""


@contextmanager
def on_termination(react: Callable[[], None]) -> Iterator[None]:
    """Call ``react`` on SIGTERM instead of the current handler. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        react()

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous if previous is not None else signal.SIG_DFL)


@contextmanager
def termination_watch() -> Iterator[Watch]:
    """Watch for SIGTERM, which no longer ends the process; the watch then returns ``STOP``."""
    told = threading.Event()
    with on_termination(told.set):
        yield lambda: Notice.STOP if told.is_set() else Notice.NONE
