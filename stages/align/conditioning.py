"""Positions inside a source token: the source's distribution, given the bytes of that token that the target has read.

The source's last boundary before the position is at byte e, and the target has read the bytes ``seen`` since. Of the source's
candidates at e only those that begin with ``seen`` and go on can still come. Their mass, rescaled, sits on what is left of
each, its *rest*. The source's next token itself is never looked at: it is what the target is to learn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Literal, Self

import numpy as np

from stages.align.pairing.token_pairing import NO_POSITION
from stages.align.rows import ModelRows, Side
from stages.align.vocabulary_maps import NO_ID
from stages.contract.roles import Role

MIN_AGREEING_MASS: Final = 0.05
"""Probability that the agreeing candidates must hold together: below, they say little about what comes."""


class Inner(IntEnum):
    """Outcome of a target position inside a source token."""

    NOT_INNER = 0
    CONDITIONED = 1
    NO_CONTEXT = 2
    """The source has no distribution before the position, or the bytes since are not known, or the target has no candidates."""
    NO_CANDIDATE = 3
    """No candidate begins with the bytes seen and continues."""
    LITTLE_MASS = 4
    """The agreeing candidates hold less than ``MIN_AGREEING_MASS``."""
    WHITE_SPACE = 5
    """Only white space is left of every agreeing candidate."""


@dataclass(frozen=True)
class SeenBytes:
    """Bytes of a source token that the target has read.

    Attributes:
        position: the target position.
        source_position: the source position at the last boundary; its distribution is conditioned.
        seen: the bytes since that boundary, as the source's tokens write them (with its dummy prefix).
    """

    position: int
    source_position: int
    seen: bytes


@dataclass(frozen=True, eq=False)
class ConditionedCandidates:
    """A source's candidates at Q target positions inside its tokens.

    Attributes:
        positions: (Q,) int64, target positions, ascending.
        source_position: (Q,) int32, the source positions at the last boundaries.
        source_ids: (Q, n) int32, the agreeing candidates in the places that they have in the window; -1 elsewhere.
        mass: (Q, n) float64, what is moved; 0 elsewhere.
        seen: Q times the bytes since the boundary.
    """

    positions: np.ndarray
    source_position: np.ndarray
    source_ids: np.ndarray
    mass: np.ndarray
    seen: tuple[bytes, ...]

    @classmethod
    def none(cls) -> Self:
        """Return candidates at no position."""
        no_position = np.empty(0, np.int32)
        return cls(no_position.astype(np.int64), no_position, np.empty((0, 0), np.int32), np.empty((0, 0)), ())


def inner_positions(
    target: ModelRows, source: ModelRows, *, target_roles: np.ndarray, source_roles: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Find the target positions at which the text read so far ends inside a source token.

    Args:
        target: M positions; those whose next token is not trained on do not count.
        source: N positions.
        target_roles: (M,) values of ``Role``.
        source_roles: (N,).

    Returns:
        positions: (Q,) int64, ascending.
        boundaries: (Q,) int32, the last source position that ends before; -1 where there is none.
    """
    size = max(len(target) - 1, 0) if len(source) else 0
    ends = target.byte_end[:size]
    if not size:
        return np.empty(0, np.int64), np.empty(0, np.int32)
    # The last source token that ends at or before each target token's end, (M - 1,).
    boundary = np.searchsorted(source.byte_end, ends, side="right") - 1
    is_after = (boundary == NO_POSITION) | (source.byte_end[np.maximum(boundary, 0)] < ends)
    # The position is inside the source token after the boundary, which must be text: template tokens have no inside.
    has_following = boundary + 1 < len(source)
    following = np.where(has_following, boundary + 1, 0)
    is_inside = is_after & has_following & (source_roles[following] == Role.TEXT)
    is_inner = is_inside & (target_roles[:size] == Role.TEXT) & (ends > 0) & target.has_label[:size]
    positions = np.flatnonzero(is_inner)
    return positions, boundary[positions].astype(np.int32)


def seen_bytes(
    target: ModelRows,
    source: ModelRows,
    positions: np.ndarray,
    boundaries: np.ndarray,
    *,
    sides: tuple[Side, Side],
    source_roles: np.ndarray,
) -> list[SeenBytes | None]:
    """Spell what the target has read since the source's last boundary, from the target's own tokens.

    Args:
        target: M positions.
        source: N positions; only where its tokens end is read.
        positions: (Q,) target positions from ``inner_positions``.
        boundaries: (Q,) source positions.
        sides: the target's tokenizer and the source's.
        source_roles: (N,) values of ``Role``.

    Returns:
        Q entries; None where the source has no distribution before the position, or where tokens do not say what bytes
        they stand for (a tokenizer that normalises, an unknown token).
    """
    target_side, source_side = sides
    target_marked, source_marked = (
        side.starts(rows)[1] for side, rows in ((target_side, target), (source_side, source))
    )
    entries: list[SeenBytes | None] = []
    for position, boundary in zip(positions.tolist(), boundaries.tolist(), strict=True):
        # After a token of a chat template that ends before the message, the source's next token holds more than content.
        is_known = boundary != NO_POSITION and source_roles[boundary] in (Role.TEXT, Role.START)
        if not is_known or not target_side.spells_text:
            entries.append(None)
            continue
        text = _text_before(target, position, int(source.byte_end[boundary]), target_side, target_marked)
        if text is None:
            entries.append(None)
            continue
        # Before the first token of a text the source writes its dummy prefix; after one that stands alone it does not.
        is_first = source_roles[boundary] == Role.START
        mark = b" " if is_first and source_marked[boundary] else b""
        entries.append(SeenBytes(position, boundary, mark + text))
    return entries


def _text_before(rows: ModelRows, position: int, start: int, side: Side, is_marked: np.ndarray) -> bytes | None:
    """Return the bytes of the text from ``start`` to the end of the token at ``position``.

    Returns None if the tokens do not spell them. ``is_marked`` is (N,) bool from ``Side.starts``.
    """
    pieces: list[bytes] = []
    # Backwards from the position to the first token that ends after ``start``.
    for index in range(position, -1, -1):
        end = int(rows.byte_end[index])
        token_start = int(rows.byte_end[index - 1]) if index else 0
        if end <= start:
            break
        piece = side.vocabulary.token_bytes[rows.token_ids[index]]
        has_mark = is_marked[index - 1] if index else side.has_dummy_prefix
        if has_mark and len(piece) == end - token_start + 1:
            piece = piece.removeprefix(b" ")
        # A token whose bytes are not as long as its piece of the text was changed by a normaliser.
        if len(piece) != end - token_start or side.vocabulary.is_special[rows.token_ids[index]]:
            return None
        pieces.append(piece[max(0, start - token_start) :])
    return b"".join(reversed(pieces))


def condition(
    seen: Sequence[SeenBytes | None],
    ids: np.ndarray,
    probs: np.ndarray,
    source: Side,
    *,
    tail: Literal["renormalise", "bucket"],
) -> tuple[ConditionedCandidates, np.ndarray]:
    """Condition the source's candidates on what was read of its next token.

    With ``tail = "bucket"`` the agreeing candidates share the mass that the whole window has, so that the row keeps the
    source's tail; with ``"renormalise"`` they share 1.

    Args:
        seen: Q entries, from ``seen_bytes``.
        ids: (Q, n) the source's window at each entry's source position, descending; -1 at pads. Rows of None are not read.
        probs: (Q, n) probabilities over the full vocabulary; 0 at pads.
        source: the source's tokenizer.
        tail: treatment of the mass outside the window.

    Returns:
        The candidates at the positions that get a distribution, and for each entry its ``Inner``, (Q,) uint8.
    """
    vocabulary = source.vocabulary
    outcome = np.full(len(seen), Inner.NO_CONTEXT, np.uint8)
    agrees = np.zeros(ids.shape, np.bool_)
    # 1. Find the candidates that begin with the bytes seen and go on, (Q, n).
    for row, entry in enumerate(seen):
        if entry is None:
            continue
        rests = []
        for column, token_id in enumerate(ids[row].tolist()):
            if token_id == NO_ID or vocabulary.is_special[token_id]:
                continue
            token = vocabulary.token_bytes[token_id]
            if len(token) > len(entry.seen) and token.startswith(entry.seen):
                agrees[row, column] = True
                rests.append(token[len(entry.seen) :])
        outcome[row] = _judge(rests, float(probs[row, agrees[row]].sum()))
    # 2. Rescale their mass at the K positions that are kept.
    kept = np.flatnonzero(outcome == Inner.CONDITIONED)
    agreeing = np.where(agrees[kept], probs[kept], 0.0)
    # Rounded logprobs of a peaked row can sum to a little more than 1.
    total = 1.0 if tail == "renormalise" else np.minimum(probs[kept].sum(axis=1, keepdims=True), 1.0)
    entries = [entry for row in kept.tolist() if (entry := seen[row]) is not None]
    return ConditionedCandidates(
        positions=np.array([entry.position for entry in entries], np.int64),
        source_position=np.array([entry.source_position for entry in entries], np.int32),
        source_ids=np.where(agrees[kept], ids[kept], NO_ID).astype(np.int32),
        mass=agreeing / agreeing.sum(axis=1, keepdims=True) * total,
        seen=tuple(entry.seen for entry in entries),
    ), outcome


def _judge(rests: Sequence[bytes], mass: float) -> Inner:
    if not rests:
        return Inner.NO_CANDIDATE
    if mass < MIN_AGREEING_MASS:
        return Inner.LITTLE_MASS
    # Rests of white space say that a word ends here, not which word the target's next token begins.
    if all(rest.decode("utf-8", errors="replace").isspace() for rest in rests):
        return Inner.WHITE_SPACE
    return Inner.CONDITIONED
