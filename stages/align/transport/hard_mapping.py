"""Hard mappings of one vocabulary into another: each source token to one target token, or to none."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numba import njit
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from stages.align.vocabulary_maps import NO_ID, text_ids
from stages.models.vocabulary import Vocabulary

_UNKNOWN: Final = -2
"""A source token for which the nearest target token has not been looked for yet."""
_BLOCK_CELLS: Final = 2**22
"""Distances computed at once; bounds memory."""


class NearestTokens:
    """Target token at the smallest edit distance from each source token (FuseLLM's mapping).

    Text goes to text only, special tokens as in ``exact_map``. Of the target tokens at the smallest distance the one
    that the target's own window ranks highest is taken, and if none is there, the one with the lowest id; of several
    target tokens with the same text only the preferred one is looked at outside the window.

    A token's nearest is searched when it is first needed, and kept: two integers per source token, so memory is
    bounded by the vocabulary. The search compares texts in order of the difference of lengths, which is a lower bound
    of the distance, and stops when that bound is above the best distance.

    Args:
        source: vocabulary of the source.
        target: vocabulary of the target.
        source_texts: text of each source id, decoded.
        target_texts: text of each target id.
        exact: (V of the source,) from ``exact_map``.
        preferred: preferred ids, as for ``exact_map``.

    Source: FuseLLM (arXiv 2401.10491), "Token alignment", minimum edit distance.
    """

    def __init__(
        self,
        source: Vocabulary,
        target: Vocabulary,
        *,
        source_texts: Sequence[str],
        target_texts: Sequence[str],
        exact: np.ndarray,
        preferred: Mapping[bytes, int],
    ) -> None:
        self._source_texts = source_texts
        by_length: dict[int, list[tuple[int, str]]] = defaultdict(list)
        for token_id in sorted(text_ids(target, preferred).values()):
            by_length[len(target_texts[token_id])].append((token_id, target_texts[token_id]))
        self._buckets = {
            length: (np.array([token_id for token_id, _ in bucket], np.int32), [text for _, text in bucket])
            for length, bucket in by_length.items()
        }
        self._longest = max(self._buckets, default=0)
        has_text = np.array([bool(token) for token in source.token_bytes], np.bool_)
        # These need no search: tokens that both vocabularies have, special tokens, and ids without a token.
        is_settled = (exact != NO_ID) | source.is_special | ~has_text
        self._ids = np.where(is_settled, exact, _UNKNOWN).astype(np.int32)
        self._distances = np.zeros(source.size, np.int32)
        self._source_is_special = source.is_special
        self._target_is_special = target.is_special

    def nearest(self, source_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the nearest target tokens, regardless of any window.

        Args:
            source_ids: any shape; -1 at pads.

        Returns:
            ids, the same shape, int32: at the smallest distance the lowest id; -1 where there is none and at pads.
            distances: int32, in edits; 0 where there is none and at pads.
        """
        is_real = source_ids != NO_ID
        wanted = np.unique(source_ids[is_real])
        by_length: dict[int, list[int]] = defaultdict(list)
        for token_id in wanted[self._ids[wanted] == _UNKNOWN].tolist():
            by_length[len(self._source_texts[token_id])].append(token_id)
        for length, group in by_length.items():
            self._search_group(np.array(group), length)
        safe = np.where(is_real, source_ids, 0)
        return np.where(is_real, self._ids[safe], NO_ID), np.where(is_real, self._distances[safe], 0)

    def map(self, source_ids: np.ndarray, top_k_ids: np.ndarray, top_k_distances: np.ndarray) -> np.ndarray:
        """Map each candidate to its target token; the target's window decides between equally near ones.

        Args:
            source_ids: (P, n); -1 at pads.
            top_k_ids: (P, k) the target's own candidates, descending; -1 at pads.
            top_k_distances: (P, n, k) edits between the two.

        Returns:
            (P, n) int32; -1 where there is none.
        """
        ids, distances = self.nearest(source_ids)
        return _prefer_top_k(
            ids,
            distances,
            self._source_is_special[np.where(source_ids != NO_ID, source_ids, 0)],
            top_k_ids,
            top_k_distances,
            self._target_is_special,
        )

    def _search_group(self, group: np.ndarray, length: int) -> None:
        """Search for source tokens of one length together.

        RapidFuzz compares several short texts in one instruction.
        """
        best = np.full(len(group), np.iinfo(np.int32).max, np.int32)
        ids = np.full(len(group), NO_ID, np.int32)
        for difference in range(max(length, self._longest) + 1):
            # >=, not >: texts at this difference may tie with the best distance and have a lower id.
            open_rows = np.flatnonzero(best >= difference)
            if not len(open_rows):
                break
            texts = [self._source_texts[token_id] for token_id in group[open_rows].tolist()]
            for bucket in {length - difference, length + difference} & self._buckets.keys():
                self._improve(open_rows, texts, bucket, best, ids)
        self._ids[group] = ids
        self._distances[group] = np.where(ids == NO_ID, 0, best)

    def _improve(self, rows: np.ndarray, texts: list[str], bucket: int, best: np.ndarray, ids: np.ndarray) -> None:
        """Update the best matches with the target texts of one length; of equally near tokens the lowest id wins."""
        bucket_ids, bucket_texts = self._buckets[bucket]
        longest = max(bucket, len(texts[0]))
        dtype = np.uint8 if longest < 2**8 else np.uint16 if longest < 2**16 else np.int32
        step = max(1, _BLOCK_CELLS // len(bucket_texts))
        for start in range(0, len(texts), step):
            block = rows[start : start + step]
            distances = cdist(texts[start : start + step], bucket_texts, scorer=Levenshtein.distance, dtype=dtype)
            column = distances.argmin(axis=1)  # the first of equal ones, and a bucket's ids ascend
            nearest, nearest_ids = distances[np.arange(len(block)), column].astype(np.int32), bucket_ids[column]
            is_better = (nearest < best[block]) | ((nearest == best[block]) & (nearest_ids < ids[block]))
            best[block[is_better]] = nearest[is_better]
            ids[block[is_better]] = nearest_ids[is_better]


def hard_plan(mapped: np.ndarray, source_mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Build the transport plan of a hard mapping.

    Args:
        mapped: (P, n) the target token of each candidate; -1 where there is none.
        source_mass: (P, n) the candidates' mass.

    Returns:
        support_ids: (P, n) int32, the target tokens in the order in which candidates name them, each once; -1 at pads.
        plan: (P, n, n); a row is the candidate's mass in its token's column, or zeros for a candidate without token.
    """
    return _hard_plan(mapped, source_mass)


@njit(cache=True)
def _prefer_top_k(
    ids: np.ndarray,
    distances: np.ndarray,
    source_is_special: np.ndarray,
    top_k_ids: np.ndarray,
    top_k_distances: np.ndarray,
    target_is_special: np.ndarray,
) -> np.ndarray:
    mapped = ids.copy()
    num_problems, n = ids.shape
    for problem in range(num_problems):
        for x in range(n):
            if ids[problem, x] == NO_ID or source_is_special[problem, x]:
                continue
            for y in range(top_k_ids.shape[1]):
                token = top_k_ids[problem, y]
                if (
                    token != NO_ID
                    and not target_is_special[token]
                    and top_k_distances[problem, x, y] == distances[problem, x]
                ):
                    mapped[problem, x] = token
                    break
    return mapped


@njit(cache=True)
def _hard_plan(mapped: np.ndarray, source_mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    num_problems, n = mapped.shape
    support_ids = np.full((num_problems, n), NO_ID, np.int32)
    plan = np.zeros((num_problems, n, n))
    for problem in range(num_problems):
        size = 0
        for x in range(n):
            token = mapped[problem, x]
            if token == NO_ID or source_mass[problem, x] <= 0:
                continue
            column = 0
            while column < size and support_ids[problem, column] != token:
                column += 1
            support_ids[problem, column] = token
            size = max(size, column + 1)
            plan[problem, x, column] = source_mass[problem, x]
    return support_ids, plan
