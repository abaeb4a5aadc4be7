"""Geometry of a model's tokens: directions of its input embeddings."""

from typing import Final

import numpy as np

from stages.models.vocabulary import Vocabulary

BLOCK_VALUES: Final = 2**22
"""Embedding values gathered at once; bounds memory."""


class TokenSpace:
    """Directions of a vocabulary's tokens from their common centre.

    The embeddings are centred first: language models share a large common direction in which all tokens look alike. Then
    they are scaled to unit length: norms reflect how frequent a token is, and some models scale their embeddings.

    Attributes:
        rows: (V, H) float16, the embeddings as written in the model.
        mean: (H,) float32, over the ordinary tokens.

    Args:
        embeddings: (V or more, H) the model's input embeddings.
        vocabulary: vocabulary of the same model; special tokens do not count in the mean.

    Raises:
        ValueError: the matrix has too few rows.
    """

    def __init__(self, embeddings: np.ndarray, vocabulary: Vocabulary) -> None:
        if any(vocabulary.token_bytes[len(embeddings) :]):
            raise ValueError(
                f"{len(embeddings)} embedding rows for {vocabulary.size} tokens: does this tokenizer belong to this "
                "model? Set `tokenizer` to the location of the model's own tokenizer"
            )
        self.rows = np.asarray(embeddings[: vocabulary.size], np.float16)
        num_missing = vocabulary.size - len(self.rows)
        if num_missing:  # ids without a token
            self.rows = np.concatenate([self.rows, np.zeros((num_missing, self.rows.shape[1]), np.float16)])
        self.mean = _ordinary_mean(self.rows, ~vocabulary.is_special)

    @property
    def num_dimensions(self) -> int:
        """Width H of the embeddings."""
        return self.rows.shape[1]

    def directions(self, ids: np.ndarray) -> np.ndarray:
        """Compute the directions of tokens: (Q,) ids to (Q, H) float32 of unit length."""
        return self.directions_of(self.rows[ids])

    def directions_of(self, rows: np.ndarray) -> np.ndarray:
        """Compute the directions of embeddings, or of means of some, (Q, H) float32 of unit length.

        The direction of the centre itself is zeros.
        """
        centred = rows.astype(np.float32) - self.mean
        length = np.linalg.norm(centred, axis=1, keepdims=True)
        return np.divide(centred, length, out=np.zeros_like(centred), where=length > 0)


def _ordinary_mean(rows: np.ndarray, is_ordinary: np.ndarray) -> np.ndarray:
    """Compute the mean of the ordinary rows, (H,) float32, in blocks: all rows in float32 take twice their size."""
    total = np.zeros(rows.shape[1])
    step = max(1, BLOCK_VALUES // rows.shape[1])
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        total += rows[block][is_ordinary[block]].sum(axis=0, dtype=np.float64)
    return (total / max(1, int(is_ordinary.sum()))).astype(np.float32)
