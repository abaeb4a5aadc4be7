"""What every cost offers."""

from typing import Protocol

import numpy as np


class Costs(Protocol):
    """What gives the cost matrices of a batch of transport problems."""

    def costs(self, source_ids: np.ndarray, target_ids: np.ndarray) -> np.ndarray:
        """(P, n, m) float64, >= 0, of candidates (P, n) and (P, m); 0 at pads (-1)."""
