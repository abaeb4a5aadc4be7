"""Inner and Center Distance of sparse distributions, in the target's input-embedding space.

The paper names them and gives no formula. Ours, for a distribution p over tokens y whose embeddings have the directions
u_y (``TokenSpace``: centred, of unit length), p rescaled to 1 over the tokens that it names:

    centre(p)    = sum_y p_y u_y
    Inner(p)     = sum_y p_y ||u_y - centre(p)||          in [0, 1]
    Center(p, q) = ||centre(p) - centre(q)||              in [0, 2]

See docs/interpretability.md for what they mean, and why these.
"""

from typing import NamedTuple

import numpy as np

from stages.contract.columns import PAD_ID, SparseRows
from stages.models.token_space import BLOCK_VALUES, TokenSpace


class Spread(NamedTuple):
    """Inner Distances and centres of N distributions.

    Attributes:
        inner: (N,) Inner Distance; NaN where there is no distribution.
        centre: (N, H) float32; NaN there.
    """

    inner: np.ndarray
    centre: np.ndarray


def spread(rows: SparseRows, space: TokenSpace) -> Spread:
    """Compute Inner Distance and centre of each distribution.

    Args:
        rows: N distributions of at most k tokens; the mass that a row lacks of 1 belongs to unknown tokens and is left out.
        space: token space of the vocabulary that the rows are over.
    """
    num_rows, width = rows.ids.shape
    inner = np.full(num_rows, np.nan)
    centre = np.full((num_rows, space.num_dimensions), np.nan, np.float32)
    present = np.flatnonzero(rows.present)
    step = max(1, BLOCK_VALUES // max(1, width * space.num_dimensions))
    for start in range(0, len(present), step):
        block = present[start : start + step]
        inner[block], centre[block] = _spread(rows.ids[block], rows.logprobs[block], space)
    return Spread(inner, centre)


def center_distance(first: Spread, second: Spread) -> np.ndarray:
    """Compute the Center Distances, (N,); NaN where either side has no distribution."""
    return np.linalg.norm(first.centre.astype(np.float64) - second.centre, axis=1)


def _spread(ids: np.ndarray, logprobs: np.ndarray, space: TokenSpace) -> tuple[np.ndarray, np.ndarray]:
    """Compute the Inner Distances (P,) and centres (P, H) of rows (P, k), each of which has a token."""
    known = ids != PAD_ID
    probs = np.where(known, np.exp(logprobs.astype(np.float64)), 0.0)
    probs /= probs.sum(axis=1, keepdims=True)
    tokens, place = np.unique(np.where(known, ids, ids[:, :1]), return_inverse=True)
    directions = space.directions(tokens)[place.reshape(ids.shape)]  # (P, k, H)
    centre = np.einsum("pk,pkh->ph", probs.astype(np.float32), directions)
    distance = np.linalg.norm(directions - centre[:, None, :], axis=2)
    return (probs * distance).sum(axis=1), centre
