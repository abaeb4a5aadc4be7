"""Seconds of pieces of work that overlap in time, counted so that together they are the time that passed."""

import threading
import time


class BusyTime:
    """Divides a worker's time among the pieces of work that it finishes.

    A piece gets the time since it began or since the piece before it ended, whichever is later. Without overlap that is its own
    duration. With overlap no second is counted twice, so that sums over pieces are what a worker was busy for, and rates and
    costs computed from them hold. Safe to use from several threads.
    """

    def __init__(self) -> None:
        """Start with nothing counted."""
        self._lock = threading.Lock()
        self._counted_until = float("-inf")

    def finish(self, started: float) -> float:
        """Return the seconds of a piece of work that ends now.

        Args:
            started: ``time.monotonic()`` when it began.
        """
        with self._lock:
            now = time.monotonic()
            seconds = now - max(started, self._counted_until)
            self._counted_until = now
        return seconds
