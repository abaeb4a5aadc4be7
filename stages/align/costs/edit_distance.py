"""Edit distances between the texts of candidates: the paper's cost."""

from collections.abc import Sequence
from typing import Final, Self

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cpdist

from stages.align.costs.pair_cache import NO_PAIR, PairCache
from stages.align.vocabulary_maps import ModelPair

CACHE_SLOTS: Final = 2**22
"""Slots of ``EditDistanceCosts``: 16 bytes each, 67 MB per worker."""


class EditDistanceCosts:
    """Levenshtein distances between candidates of two vocabularies, cached, since candidates recur.

    Memory is bounded, and results do not depend on what was asked before (``PairCache``).

    Args:
        source_texts: text of each source id.
        target_texts: text of each target id.
        num_slots: a power of two.
    """

    def __init__(
        self, source_texts: Sequence[str], target_texts: Sequence[str], *, num_slots: int = CACHE_SLOTS
    ) -> None:
        self._source_texts = _objects(source_texts)
        self._target_texts = _objects(target_texts)
        self._cache = PairCache(num_slots)

    @classmethod
    def of(cls, pair: ModelPair, *, num_slots: int | None = None) -> Self:
        """See ``base.Costs``."""
        return cls(pair.source_texts, pair.target_texts, num_slots=num_slots or CACHE_SLOTS)

    @property
    def num_cached(self) -> int:
        """Number of distinct pairs in the cache."""
        return self._cache.num_cached

    def costs(self, source_ids: np.ndarray, target_ids: np.ndarray) -> np.ndarray:
        """Return the cost matrices of a batch of transport problems.

        Args:
            source_ids: (P, n), -1 at pads.
            target_ids: (P, m), -1 at pads.

        Returns:
            (P, n, m) float64, in edits; 0 at pads.
        """
        keys = source_ids[:, :, None].astype(np.int64) * len(self._target_texts) + target_ids[:, None, :]
        keys[(source_ids < 0)[:, :, None] | (target_ids < 0)[:, None, :]] = NO_PAIR
        return self._cache.lookup(keys.reshape(-1), self._distances).reshape(keys.shape)

    def _distances(self, keys: np.ndarray) -> np.ndarray:
        """Compute the distances of pairs, each encoded as source * (number of target texts) + target."""
        source, target = np.divmod(keys, len(self._target_texts))
        return cpdist(
            self._source_texts[source].tolist(),
            self._target_texts[target].tolist(),
            scorer=Levenshtein.distance,
            dtype=np.int32,
        )


def _objects(texts: Sequence[str]) -> np.ndarray:
    array = np.empty(len(texts), object)
    array[:] = list(texts)
    return array
