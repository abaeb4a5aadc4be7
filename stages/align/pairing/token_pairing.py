"""Pair each target position with the source positions whose distribution it can use.

Rows, ``k`` and ``B_k`` belong to the source; columns, ``j`` and ``A_j`` to the target, as in a transport plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from stages.align.pairing.cheapest_path import cheapest_path
from stages.align.pairing.levenshtein import levenshtein_matrix
from stages.align.pairing.messages import text_slices
from stages.contract.roles import CONTEXT_ROLES, Role

NO_POSITION = -1


@dataclass(frozen=True)
class Pairing:
    """Source positions that each of M target positions is paired with.

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
        """Return whether some source position of a span is also in a neighbour's span, (M,) bool."""
        shared = np.zeros(len(self.start), bool)
        paired = np.flatnonzero(self.is_paired)
        # Spans are monotone, so a shared source position is shared with the next or the previous paired position.
        overlap = self.end[paired[:-1]] > self.start[paired[1:]]
        shared[paired[:-1]] |= overlap
        shared[paired[1:]] |= overlap
        return shared


def edit_distance_pairing(
    source_texts: Sequence[str],
    target_texts: Sequence[str],
    *,
    source_byte_end: np.ndarray,
    target_byte_end: np.ndarray,
    source_roles: np.ndarray | None = None,
    target_roles: np.ndarray | None = None,
) -> Pairing:
    """Compute the paper's dynamic token pairing, exactly.

    ``f(k, j) = c(B_k, A_j) + min(f(k-1, j-1), f(k-1, j), f(k, j-1))`` from the first pair to the last, with c the
    Levenshtein distance; of equal predecessors the diagonal one is taken, then (k-1, j), then (k, j-1). Every text
    position of both sides is in a pair, so a source token may have several target tokens and the reverse. BOS pairs with
    BOS and EOS with EOS; where the source has none, the target's stays unpaired.

    In a conversation each message is a text of its own, so that no token is paired with one of another message; tokens of
    chat templates are in no pair.

    Args:
        source_texts: B, (N), without word-boundary markers.
        target_texts: A, (M).
        source_byte_end: (N,) nondecreasing; where the search begins, never what it finds.
        target_byte_end: (M,) the same.
        source_roles: (N,) values of ``Role``; None: all are text.
        target_roles: (M,) the same.

    Returns:
        The pairing; without any pair when a side is empty. Time and memory as of ``cheapest_path``.

    Source: PTA-LLM, "Dynamic token pairing".
    """
    source_roles = np.full(len(source_texts), Role.TEXT, np.uint8) if source_roles is None else source_roles
    target_roles = np.full(len(target_texts), Role.TEXT, np.uint8) if target_roles is None else target_roles
    start, end, cost = (
        np.full(len(target_texts), NO_POSITION, np.int32),
        np.full(len(target_texts), NO_POSITION, np.int32),
        0,
    )
    for source, target in text_slices(source_byte_end, target_byte_end, source_roles, target_roles):
        # Tokens repeat in a text, so distances are computed only between distinct texts.
        source_unique, source_index = _unique(source_texts[source])
        target_unique, target_index = _unique(target_texts[target])
        text_start, text_end, text_cost = cheapest_path(
            levenshtein_matrix(source_unique, target_unique),
            source_index,
            target_index,
            source_end=source_byte_end[source],
            target_end=target_byte_end[target],
        )
        start[target], end[target] = text_start + source.start, text_end + source.start
        cost += text_cost
    for role in (Role.BOS, Role.EOS):
        target_positions = np.flatnonzero(target_roles == role)
        partner = _same_end(source_byte_end, target_byte_end[target_positions], np.flatnonzero(source_roles == role))
        is_paired = partner != NO_POSITION
        paired = target_positions[is_paired]
        start[paired], end[paired] = partner[is_paired], partner[is_paired] + 1
    return Pairing(start, end, cost)


def boundary_pairing(
    source_byte_end: np.ndarray, target_byte_end: np.ndarray, *, source_roles: np.ndarray, target_roles: np.ndarray
) -> Pairing:
    """Pair positions that end at the same byte: text with text, BOS with BOS, EOS with EOS. O(N + M).

    Tokens of chat templates stay unpaired. The end of each turn counts as a byte, so that the same byte is of one message.

    Args:
        source_byte_end: (N,) nondecreasing.
        target_byte_end: (M,) nondecreasing.
        source_roles: (N,) values of ``Role``.
        target_roles: (M,).

    Returns:
        Spans of one position, the last where several source positions end there; none where no source position does.
    """
    partner = np.full(len(target_byte_end), NO_POSITION, np.int32)
    for role in CONTEXT_ROLES:
        target = np.flatnonzero(target_roles == role)
        partner[target] = _same_end(source_byte_end, target_byte_end[target], np.flatnonzero(source_roles == role))
    return Pairing(partner, np.where(partner == NO_POSITION, NO_POSITION, partner + 1).astype(np.int32), 0)


def _same_end(source_byte_end: np.ndarray, ends: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Return, of the positions ``source`` (ascending), the last that ends at each of ``ends``; -1 where none does."""
    if not len(source):
        return np.full(len(ends), NO_POSITION, np.int32)
    last = np.searchsorted(source_byte_end[source], ends, side="right") - 1
    same = (last >= 0) & (source_byte_end[source[last]] == ends)
    return np.where(same, source[last], NO_POSITION).astype(np.int32)


def choose_source(
    pairing: Pairing,
    source_byte_end: np.ndarray,
    target_byte_end: np.ndarray,
    *,
    source_roles: np.ndarray,
    target_roles: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose, from the group of each target position, the one source position whose distribution it takes.

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
        # Backwards, since of several positions that end at the same byte the last one has read all of it.
        for k in range(end[j] - 1, start[j] - 1, -1):
            if source_byte_end[k] == target_byte_end[j] and source_roles[k] == target_roles[j]:
                position[j] = k
                exact[j] = True
                break
    return position, exact
