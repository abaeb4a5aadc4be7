"""Measure how much mass a transport plan moves between tokens of different texts."""

from typing import Final

import numpy as np
from numba import njit

from stages.models.vocabulary import Vocabulary

UNKNOWN_TEXT: Final = -1


def text_numbers(source: Vocabulary, target: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Assign a number to each text of both vocabularies: two tokens share it if they stand for the same text.

    That is the same bytes, or the same role or name of a special token. Ids without a token have the number -1.

    Returns:
        (V of the source,) and (V of the target,) int32.
    """
    numbers: dict[tuple[bytes, bool], int] = {}

    def of(vocabulary: Vocabulary) -> np.ndarray:
        keys = zip(vocabulary.token_bytes, vocabulary.is_special.tolist(), strict=True)
        assigned = [numbers.setdefault(key, len(numbers)) if key[0] else UNKNOWN_TEXT for key in keys]
        return np.array(assigned, np.int32)

    return of(source), of(target)


def moved_share(
    plan: np.ndarray,
    source_numbers: np.ndarray,
    support_numbers: np.ndarray,
    *,
    largest_only: bool,
) -> np.ndarray:
    """Compute the share of each plan's mass that lands on a token of a different text.

    Args:
        plan: (P, n, m) >= 0.
        source_numbers: (P, n) from ``text_numbers``.
        support_numbers: (P, m).
        largest_only: only each row's largest entry lands, as under ``projection = "argmax"``.

    Returns:
        (P,) in [0, 1]; 0 where nothing lands.
    """
    return _moved_share(plan, source_numbers, support_numbers, largest_only)


@njit(cache=True)
def _moved_share(
    plan: np.ndarray, source_numbers: np.ndarray, support_numbers: np.ndarray, largest_only: bool
) -> np.ndarray:
    num_problems, n, m = plan.shape
    share = np.zeros(num_problems)
    for problem in range(num_problems):
        landed = 0.0
        moved = 0.0
        for x in range(n):
            first, last = 0, m
            if largest_only:
                for y in range(1, m):
                    if plan[problem, x, y] > plan[problem, x, first]:
                        first = y
                last = first + 1
            for y in range(first, last):
                landed += plan[problem, x, y]
                if source_numbers[problem, x] != support_numbers[problem, y]:
                    moved += plan[problem, x, y]
        if landed > 0:
            share[problem] = moved / landed
    return share
