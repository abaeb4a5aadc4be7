"""Mass that moved from each source token to each target token, summed over many positions."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from stages.align.transporter import TransportBatch
from stages.align.vocabulary_maps import NO_ID
from stages.models.vocabulary import Vocabulary

_PENDING_PAIRS: Final = 2**21
"""Entries of plans that are kept before equal pairs are added up; bounds memory."""


@dataclass(frozen=True, eq=False)
class PairMass:
    """Transported mass by pairs of tokens; Q pairs, of the most mass first.

    Attributes:
        source_ids: (Q,) int64.
        target_ids: (Q,) int64.
        mass: (Q,) float64, > 0; a position contributes the mass that it transported, at most 1.
        is_same: (Q,) bool, both tokens stood for the same text (or the same special token) where the mass was moved. Two
            tokens that are so only at the start of a text, where one of them has a dummy prefix, are two pairs; so are a
            source token and what the target writes for its rest, where the source was conditioned.
        num_positions: positions whose mass is in it.
    """

    source_ids: np.ndarray
    target_ids: np.ndarray
    mass: np.ndarray
    is_same: np.ndarray
    num_positions: int


class PairSums:
    """Accumulator of the mass of pairs of tokens.

    Args:
        target: the target's vocabulary.
    """

    def __init__(self, target: Vocabulary) -> None:
        self._size = target.size
        self._keys: np.ndarray = np.empty(0, np.int64)
        self._mass: np.ndarray = np.empty(0)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_pending = 0
        self._num_positions = 0

    def add(self, problems: TransportBatch, landed: np.ndarray) -> None:
        """Take in the transport problems of a segment.

        Args:
            problems: P positions.
            landed: (P, n, m) their mass as it is projected, see ``projection.landed_mass``.
        """
        source = np.broadcast_to(problems.source_ids[:, :, None], landed.shape)
        target = np.broadcast_to(problems.support_ids[:, None, :], landed.shape)
        self._add(source, target, problems.same_text, landed, int((landed.sum(axis=(1, 2)) > 0).sum()))

    def add_copied(self, ids: np.ndarray, mass: np.ndarray) -> None:
        """Take in distributions that were copied, since both vocabularies are the same: (P, k) ids and mass."""
        self._add(ids, ids, np.ones(ids.shape, np.bool_), mass, len(ids))

    def result(self) -> PairMass:
        """Return the sums so far."""
        self._merge()
        pairs, is_same = self._keys >> 1, (self._keys & 1).astype(np.bool_)
        source, target = np.divmod(pairs, self._size)
        order = np.lexsort((self._keys, -self._mass))
        return PairMass(source[order], target[order], self._mass[order], is_same[order], self._num_positions)

    def _add(
        self, source: np.ndarray, target: np.ndarray, is_same: np.ndarray, mass: np.ndarray, num_positions: int
    ) -> None:
        has_mass = (mass > 0) & (source != NO_ID) & (target != NO_ID)
        keys = 2 * (source[has_mass].astype(np.int64) * self._size + target[has_mass]) + is_same[has_mass]
        self._pending.append((keys, mass[has_mass]))
        self._num_pending += len(keys)
        self._num_positions += num_positions
        if self._num_pending > _PENDING_PAIRS:
            self._merge()

    def _merge(self) -> None:
        keys = np.concatenate([self._keys, *(keys for keys, _ in self._pending)])
        mass = np.concatenate([self._mass, *(mass for _, mass in self._pending)])
        self._keys, place = np.unique(keys, return_inverse=True)
        self._mass = np.bincount(place, mass, minlength=len(self._keys))
        self._pending, self._num_pending = [], 0
