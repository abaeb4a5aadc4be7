"""Levenshtein distances between the texts of tokens (RapidFuzz).

Texts may hold lone surrogates: a byte that is not part of a whole UTF-8 character is one such code point
(``surrogateescape``), which RapidFuzz compares like any other character.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numba import njit
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist, cpdist

CACHE_SLOTS: Final = 2**22
"""Slots of ``PairDistances``: 12 bytes each, 50 MB a worker."""

_EMPTY: Final = -1
_MULTIPLIER: Final = np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing: spreads neighbouring pair numbers


def levenshtein_matrix(rows: Sequence[str], columns: Sequence[str]) -> np.ndarray:
    """The distance of every row text to every column text.

    Args:
        rows: R texts.
        columns: C texts.

    Returns:
        (R, C), the narrowest of uint8, uint16 and int32 that holds the longest text's length: a distance is never longer.
    """
    longest = max(map(len, (*rows, *columns)), default=0)
    dtype = np.uint8 if longest < 2**8 else np.uint16 if longest < 2**16 else np.int32
    if not rows or not columns:
        return np.zeros((len(rows), len(columns)), dtype)
    return cdist(rows, columns, scorer=Levenshtein.distance, dtype=dtype)


class PairDistances:
    """Distances between candidates of two vocabularies, remembered: the same candidates come back all the time.

    A table of fixed size with open addressing; when it is half full it is emptied, so memory is bounded and results do
    not depend on what was asked before.

    Args:
        source_texts: text of each source id.
        target_texts: text of each target id.
        num_slots: a power of two.
    """

    def __init__(
        self, source_texts: Sequence[str], target_texts: Sequence[str], *, num_slots: int = CACHE_SLOTS
    ) -> None:
        if num_slots < 2 or num_slots & (num_slots - 1):
            raise ValueError(f"num_slots = {num_slots}: expected a power of two, at least 2")
        self._source_texts = _objects(source_texts)
        self._target_texts = _objects(target_texts)
        self._keys = np.full(num_slots, _EMPTY, np.int64)
        self._values = np.zeros(num_slots, np.int32)
        self._num_used = 0

    @property
    def num_cached(self) -> int:
        """Distinct pairs that the table holds now."""
        return self._num_used

    def costs(self, source_ids: np.ndarray, target_ids: np.ndarray) -> np.ndarray:
        """Cost matrices of a batch of transport problems.

        Args:
            source_ids: (P, n), -1 at pads.
            target_ids: (P, m), -1 at pads.

        Returns:
            (P, n, m) float64, in edits; 0 at pads.
        """
        num_problems, n = source_ids.shape
        m = target_ids.shape[1]
        keys = source_ids[:, :, None].astype(np.int64) * len(self._target_texts) + target_ids[:, None, :]
        keys[(source_ids < 0)[:, :, None] | (target_ids < 0)[:, None, :]] = _EMPTY
        flat = keys.reshape(-1)
        costs = np.empty(len(flat))
        step = len(self._keys) // 2
        for start in range(0, len(flat), step):
            part = flat[start : start + step]
            if self._num_used + len(part) > step:
                self._make_room(part, step)
            costs[start : start + step] = self._lookup(part)
        return costs.reshape(num_problems, n, m)

    def _make_room(self, keys: np.ndarray, limit: int) -> None:
        """Empty the table if these keys could fill more than half of it; counted exactly only when it is close."""
        if self._num_used + len(np.unique(keys)) > limit:
            self._keys.fill(_EMPTY)
            self._num_used = 0

    def _lookup(self, keys: np.ndarray) -> np.ndarray:
        slots, missing = _find_slots(self._keys, keys)
        if len(missing):
            source, target = np.divmod(keys[missing], len(self._target_texts))
            self._values[slots[missing]] = cpdist(
                self._source_texts[source].tolist(),
                self._target_texts[target].tolist(),
                scorer=Levenshtein.distance,
                dtype=np.int32,
            )
            self._num_used += len(missing)
        return np.where(slots < 0, 0, self._values[slots])


def _objects(texts: Sequence[str]) -> np.ndarray:
    array = np.empty(len(texts), object)
    array[:] = list(texts)
    return array


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
        if key == _EMPTY:
            slots[index] = -1
            continue
        slot = (np.uint64(key) * _MULTIPLIER) >> shift
        while table[slot] != key and table[slot] != _EMPTY:
            slot = (slot + np.uint64(1)) & mask
        if table[slot] == _EMPTY:
            table[slot] = key
            missing[num_missing] = index
            num_missing += 1
        slots[index] = slot
    return slots, missing[:num_missing]
