"""Prefix cost: differences are cheap where one text begins with the other and the tokenizer really cuts it there."""

from typing import Final, Self

import numpy as np
from numba import njit

from stages.align.costs.base import Costs
from stages.align.costs.edit_distance import EditDistanceCosts
from stages.align.vocabulary_maps import NO_ID, ModelPair
from stages.models.vocabulary import Vocabulary

EDITS_PER_BYTE: Final = 0.1
"""Cost per byte of difference where one text begins with the other."""


class PrefixCosts:
    """Edit distance, or 0.1 per byte of difference where one text begins with the other and is really cut there.

    A source that says `` inter`` does not contradict `` international``: it has the same text to come, cut elsewhere. But
    that holds only if it really would be cut so. A target token that is shorter must be the one with which the target's
    tokenizer begins the source token's text, and a source token that is shorter the one with which the source's tokenizer
    begins the target token's text. Otherwise the bare space, which is the beginning of most words and how none of them is
    written, would take mass from all of them.

    Special tokens are never prefixes, and have none.

    Args:
        source: vocabulary of the source.
        target: vocabulary of the target.
        distances: their edit distances.
        source_cut: (V of the source,) int32; bytes of the token with which the target's tokenizer begins the text of each
            source token; 0 where none is known.
        target_cut: (V of the target,) int32; the source's tokenizer, and the text of each target token.
    """

    def __init__(
        self,
        source: Vocabulary,
        target: Vocabulary,
        distances: Costs,
        *,
        source_cut: np.ndarray,
        target_cut: np.ndarray,
    ) -> None:
        self._distances = distances
        self._source = (*_flat_texts(source), source_cut)
        self._target = (*_flat_texts(target), target_cut)

    @classmethod
    def of(cls, pair: ModelPair, *, num_slots: int | None = None) -> Self:
        """Return the costs of a pair of models; tokenizes each vocabulary once with the other model's tokenizer."""
        return cls(
            pair.source,
            pair.target,
            EditDistanceCosts.of(pair, num_slots=num_slots),
            source_cut=pair.source_cut,
            target_cut=pair.target_cut,
        )

    def costs(self, source_ids: np.ndarray, target_ids: np.ndarray) -> np.ndarray:
        """Return the cost matrices of a batch of transport problems; see ``Costs``."""
        costs = np.array(self._distances.costs(source_ids, target_ids), np.float64)
        _lower_prefixes(costs, source_ids, target_ids, *self._source, *self._target)
        return costs


def _flat_texts(vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate the bytes of all ordinary tokens, with the start of each (V + 1,); special tokens have no bytes."""
    texts = [
        b"" if is_special else token
        for token, is_special in zip(vocabulary.token_bytes, vocabulary.is_special.tolist(), strict=True)
    ]
    starts = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) for text in texts], out=starts[1:])
    return np.frombuffer(b"".join(texts), np.uint8), starts


@njit(cache=True)
def _lower_prefixes(
    costs: np.ndarray,
    source_ids: np.ndarray,
    target_ids: np.ndarray,
    source_bytes: np.ndarray,
    source_starts: np.ndarray,
    source_cut: np.ndarray,
    target_bytes: np.ndarray,
    target_starts: np.ndarray,
    target_cut: np.ndarray,
) -> None:
    num_problems, n, m = costs.shape
    for problem in range(num_problems):
        for x in range(n):
            source = source_ids[problem, x]
            if source == NO_ID:
                continue
            source_start = source_starts[source]
            source_length = source_starts[source + 1] - source_start
            for y in range(m):
                target = target_ids[problem, y]
                if target == NO_ID:
                    continue
                target_start = target_starts[target]
                target_length = target_starts[target + 1] - target_start
                # The lengths decide before any byte is read: only the tokenizer's own first token counts.
                if target_length < source_length and target_length != source_cut[source]:
                    continue
                if source_length < target_length and source_length != target_cut[target]:
                    continue
                shared = min(source_length, target_length)
                if shared == 0:
                    continue
                same = 0
                while same < shared and source_bytes[source_start + same] == target_bytes[target_start + same]:
                    same += 1
                if same == shared:
                    costs[problem, x, y] = EDITS_PER_BYTE * abs(source_length - target_length)
