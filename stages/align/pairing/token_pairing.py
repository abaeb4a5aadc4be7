"""Which source position a target position takes its distribution from.

Rows, ``k`` and ``B_k`` belong to the source; columns, ``j`` and ``A_j`` to the target, as in a transport plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numba import njit

from stages.align.pairing.cheapest_path import cheapest_path
from stages.align.pairing.levenshtein import levenshtein_matrix

NO_POSITION = -1


class Role(IntEnum):
    """What a token is to the pairing: special tokens have no bytes and pair by role."""

    TEXT = 0
    BOS = 1
    EOS = 2


ROLE_TEXTS = {Role.BOS: "<bos>", Role.EOS: "<eos>"}
"""What a special token's text is for the edit distance, whatever its tokenizer calls it."""


@dataclass(frozen=True)
class Pairing:
    """For each of M target positions the source positions that it is paired with.

    Attributes:
        start: (M,) int32, first paired source position; -1 where there is none.
        end: (M,) int32, one past the last; -1 where there is none.
        cost: edits on the whole path; 0 for a pairing by boundaries.
    """

    start: np.ndarray
    end: np.ndarray
    cost: int

    @property
    def is_paired(self) -> np.ndarray:
        """(M,) bool."""
        return self.start != NO_POSITION

    def shares_source(self) -> np.ndarray:
        """(M,) bool: some source position of the target position's span is also in a neighbour's span."""
        shared = np.zeros(len(self.start), bool)
        paired = np.flatnonzero(self.is_paired)
        # Spans are monotone, so a shared source position is shared with the next or the previous paired position.
        overlap = self.end[paired[:-1]] > self.start[paired[1:]]
        shared[paired[:-1]] |= overlap
        shared[paired[1:]] |= overlap
        return shared


def token_roles(token_ids: np.ndarray, *, bos_id: int | None, eos_id: int | None, prepends_bos: bool) -> np.ndarray:
    """The role of each token of a segment.

    By place as well as by id, since some models use one id for both roles: BOS is only ever the first token, of a model
    that prepends it, and EOS only ever the last.

    Args:
        token_ids: (N,).
        bos_id: the tokenizer's BOS, None without.
        eos_id: the tokenizer's EOS, None without.
        prepends_bos: the model's segments begin with BOS.

    Returns:
        (N,) uint8, values of ``Role``.
    """
    roles = np.full(len(token_ids), Role.TEXT, np.uint8)
    if len(token_ids) and eos_id is not None and token_ids[-1] == eos_id:
        roles[-1] = Role.EOS
    if len(token_ids) and prepends_bos and bos_id is not None and token_ids[0] == bos_id:
        roles[0] = Role.BOS
    return roles


def edit_distance_pairing(
    source_texts: Sequence[str],
    target_texts: Sequence[str],
    *,
    source_byte_end: np.ndarray,
    target_byte_end: np.ndarray,
) -> Pairing:
    """The paper's dynamic token pairing, exact.

    ``f(k, j) = c(B_k, A_j) + min(f(k-1, j-1), f(k-1, j), f(k, j-1))`` from the first pair to the last, with c the
    Levenshtein distance; of equal predecessors the diagonal one is taken, then (k-1, j), then (k, j-1). Every position
    of both sides is in a pair, so a source token may have several target tokens and the reverse.

    Args:
        source_texts: B, (N), without word-boundary markers; a special token's is its role's.
        target_texts: A, (M).
        source_byte_end: (N,) nondecreasing; where the search begins, never what it finds.
        target_byte_end: (M,) the same.

    Returns:
        The pairing; without any pair when a side is empty. Time and memory as of ``cheapest_path``.

    Source: PTA-LLM, "Dynamic token pairing".
    """
    source_unique, source_index = _unique(source_texts)
    target_unique, target_index = _unique(target_texts)
    if not source_unique or not target_unique:
        return _no_pairs(len(target_index))
    distances = levenshtein_matrix(source_unique, target_unique)
    return Pairing(
        *cheapest_path(distances, source_index, target_index, source_end=source_byte_end, target_end=target_byte_end)
    )


def boundary_pairing(
    source_byte_end: np.ndarray, target_byte_end: np.ndarray, *, source_roles: np.ndarray, target_roles: np.ndarray
) -> Pairing:
    """Pair positions that end at the same byte: text with text, BOS with BOS, EOS with EOS. O(N + M).

    Args:
        source_byte_end: (N,) nondecreasing.
        target_byte_end: (M,) nondecreasing.
        source_roles: (N,) values of ``Role``.
        target_roles: (M,).

    Returns:
        Spans of one position, the last where several source positions end there; none where no source position does.
    """
    partner = np.full(len(target_byte_end), NO_POSITION, np.int32)
    for role in Role:
        source = np.flatnonzero(source_roles == role)
        target = np.flatnonzero(target_roles == role)
        if not len(source):
            continue
        ends = source_byte_end[source]
        last = np.searchsorted(ends, target_byte_end[target], side="right") - 1
        same = (last >= 0) & (ends[last] == target_byte_end[target])
        partner[target[same]] = source[last[same]]
    return Pairing(partner, np.where(partner == NO_POSITION, NO_POSITION, partner + 1).astype(np.int32), 0)


def choose_source(
    pairing: Pairing,
    source_byte_end: np.ndarray,
    target_byte_end: np.ndarray,
    *,
    source_roles: np.ndarray,
    target_roles: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """From each group the one source position whose distribution the target position takes.

    Args:
        pairing: M spans of source positions.
        source_byte_end: (N,).
        target_byte_end: (M,).
        source_roles: (N,) values of ``Role``.
        target_roles: (M,).

    Returns:
        source_position: (M,) int32: the last of the group that ends at the same byte (and has the same role), else the
            group's last; -1 without a group.
        exact_context: (M,) bool: there is one that ends at the same byte, so both distributions condition on the same
            text.
    """
    return _choose(pairing.start, pairing.end, source_byte_end, target_byte_end, source_roles, target_roles)


def _unique(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    numbers: dict[str, int] = {}
    index = np.array([numbers.setdefault(text, len(numbers)) for text in texts], np.int64)
    return list(numbers), index


def _no_pairs(num_target: int) -> Pairing:
    nothing = np.full(num_target, NO_POSITION, np.int32)
    return Pairing(nothing, nothing.copy(), 0)


@njit(cache=True)
def _choose(
    start: np.ndarray,
    end: np.ndarray,
    source_byte_end: np.ndarray,
    target_byte_end: np.ndarray,
    source_roles: np.ndarray,
    target_roles: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    position = np.full(len(start), NO_POSITION, np.int32)
    exact = np.zeros(len(start), np.bool_)
    for j in range(len(start)):
        if start[j] == NO_POSITION:
            continue
        position[j] = end[j] - 1
        for k in range(end[j] - 1, start[j] - 1, -1):
            if source_byte_end[k] == target_byte_end[j] and source_roles[k] == target_roles[j]:
                position[j] = k
                exact[j] = True
                break
    return position, exact
