"""A bounded table of what was computed for pairs of ids."""

from collections.abc import Callable
from typing import Final

import numpy as np
from numba import njit

NO_PAIR: Final = -1
"""Key of a pad: its value is 0 and it is never computed."""

_MULTIPLIER: Final = np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing: spreads neighbouring pair numbers


class PairCache:
    """Values of integer keys >= 0, in a table of fixed size with open addressing.

    When it is half full it is emptied, so memory is bounded and values do not depend on what was asked before.

    Args:
        num_slots: a power of two; 12 bytes each.

    Raises:
        ValueError: it is no power of two.
    """

    def __init__(self, num_slots: int) -> None:
        if num_slots < 2 or num_slots & (num_slots - 1):
            raise ValueError(f"num_slots = {num_slots}: expected a power of two, at least 2")
        self._keys = np.full(num_slots, NO_PAIR, np.int64)
        self._values = np.zeros(num_slots, np.float32)
        self._num_used = 0

    @property
    def num_cached(self) -> int:
        """Distinct keys that the table holds now."""
        return self._num_used

    def lookup(self, keys: np.ndarray, compute: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """The value of each key.

        Args:
            keys: (N,) int64; ``NO_PAIR`` at pads.
            compute: gives the values of keys that the table lacks, each once.

        Returns:
            (N,) float64; 0 at pads.
        """
        found = np.empty(len(keys))
        limit = len(self._keys) // 2
        for start in range(0, len(keys), limit):
            part = keys[start : start + limit]
            # Counted exactly only when the table could get too full.
            if self._num_used + len(part) > limit and self._num_used + len(np.unique(part)) > limit:
                self._clear()
            slots, missing = _find_slots(self._keys, part)
            if len(missing):
                is_computed = False
                try:
                    self._values[slots[missing]] = compute(part[missing])
                    is_computed = True
                finally:
                    if not is_computed:  # the keys are claimed already: they must not keep what their slots held before
                        self._clear()
                self._num_used += len(missing)
            found[start : start + limit] = np.where(slots < 0, 0.0, self._values[slots])
        return found

    def _clear(self) -> None:
        self._keys.fill(NO_PAIR)
        self._num_used = 0


@njit(cache=True)
def _find_slots(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slot of each key, claimed if it was not there; and the first place of each key that was not there."""
    mask = np.uint64(len(table) - 1)
    shift = np.uint64(64)
    size = len(table)
    while size > 1:
        size >>= 1
        shift -= np.uint64(1)
    slots = np.empty(len(keys), np.int64)
    missing = np.empty(len(keys), np.int64)
    num_missing = 0
    for index in range(len(keys)):
        key = keys[index]
        if key == NO_PAIR:
            slots[index] = -1
            continue
        slot = (np.uint64(key) * _MULTIPLIER) >> shift
        while table[slot] != key and table[slot] != NO_PAIR:
            slot = (slot + np.uint64(1)) & mask
        if table[slot] == NO_PAIR:
            table[slot] = key
            missing[num_missing] = index
            num_missing += 1
        slots[index] = slot
    return slots, missing[:num_missing]
