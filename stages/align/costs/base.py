"""Interface of all costs."""

from typing import Protocol, Self

import numpy as np

from stages.align.vocabulary_maps import ModelPair


class Costs(Protocol):
    """Cost of moving mass from a source token to a target token, in edits."""

    @classmethod
    def of(cls, pair: ModelPair, *, num_slots: int | None = None) -> Self:
        """Return the costs of a pair of models.

        Args:
            pair: the two models.
            num_slots: pairs that are remembered, a power of two; the cost's own default where None.
        """
        ...

    def costs(self, source_ids: np.ndarray, target_ids: np.ndarray) -> np.ndarray:
        """Return the cost matrices of a batch of transport problems.

        Args:
            source_ids: (P, n) candidates of the source; -1 at pads.
            target_ids: (P, m) candidates of the target; -1 at pads.

        Returns:
            (P, n, m) float64, >= 0; 0 at pads.
        """
        ...
