"""Bounded cache of values that belong to pairs of ids."""

from collections.abc import Callable
from typing import Final

import numpy as np
from numba import njit

NO_PAIR: Final = -1
"""Key of a pad: its value is 0 and it is never computed."""

_MULTIPLIER: Final = np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing: spreads neighbouring pair numbers


class PairCache:
    """Values of integer keys >= 0, in a table of fixed size with open addressing.

    A table that is half full is emptied, so memory is bounded. Values never depend on earlier look-ups.

    Args:
        num_slots: a power of two; 16 bytes each.

    Raises:
        ValueError: the number of slots is not a power of two.
    """

    def __init__(self, num_slots: int) -> None:
        if num_slots < 2 or num_slots & (num_slots - 1):
            raise ValueError(f"num_slots = {num_slots}: expected a power of two, at least 2")
        # Each key lies next to its value, so that one look-up misses the processor's cache once, not twice.
        self._table = np.full((num_slots, 2), NO_PAIR, np.int64)
        self._values = self._table.view(np.float64)[:, 1]
        self._num_used = 0

    @property
    def num_cached(self) -> int:
        """Number of distinct keys in the table."""
        return self._num_used

    def lookup(self, keys: np.ndarray, compute: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Return the value of each key, computing those that are missing.

        Args:
            keys: (N,) int64; ``NO_PAIR`` at pads.
            compute: gives the values of keys that the table lacks, each once.

        Returns:
            (N,) float64; 0 at pads.
        """
        costs = np.empty(len(keys))
        limit = len(self._table) // 2
        for start in range(0, len(keys), limit):
            block = keys[start : start + limit]
            # Distinct keys are counted only if the table could get too full: np.unique sorts.
            if self._num_used + len(block) > limit and self._num_used + len(np.unique(block)) > limit:
                self._clear()
            values = costs[start : start + limit]
            slots, missing = _find(self._table, self._values, block, values)
            if len(missing):
                is_computed = False
                try:
                    self._values[slots[missing]] = compute(block[missing]).astype(np.float32)
                    is_computed = True
                finally:
                    # The keys are claimed already, so a failure would leave them with the values of their slots' former keys.
                    if not is_computed:
                        self._clear()
                self._num_used += len(missing)
                values[:] = np.where(slots < 0, 0.0, self._values[slots])
        return costs

    def _clear(self) -> None:
        self._table[:, 0] = NO_PAIR
        self._num_used = 0


@njit(cache=True)
def _find(
    table: np.ndarray, table_values: np.ndarray, keys: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Find the slot of each key, and claim one for each missing key.

    Also writes the keys' values, which are meaningful only if no key was missing.

    Returns:
        slots (N,), -1 at pads; and the index of the first occurrence of each missing key.

    Writes the keys' values, which mean something only where no key was missing.
    """
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
            values[index] = 0.0
            continue
        slot = (np.uint64(key) * _MULTIPLIER) >> shift
        while table[slot, 0] != key and table[slot, 0] != NO_PAIR:
            slot = (slot + np.uint64(1)) & mask
        if table[slot, 0] == NO_PAIR:
            table[slot, 0] = key
            missing[num_missing] = index
            num_missing += 1
        slots[index] = slot
        values[index] = table_values[slot]
    return slots, missing[:num_missing]
