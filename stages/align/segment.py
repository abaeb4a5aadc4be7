"""Align one segment: from the two models' rows to a distribution over the target's vocabulary at each target position."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from stages.align.conditioning import ConditionedCandidates, Inner, condition, inner_positions, seen_bytes
from stages.align.config import AlignConfig
from stages.align.pairing.token_pairing import (
    NO_POSITION,
    Pairing,
    boundary_pairing,
    choose_source,
    edit_distance_pairing,
)
from stages.align.rows import ModelRows, Side, narrow
from stages.align.transport.projection import column_mass, keep_largest, landed_mass
from stages.align.transporter import TransportBatch, Transporter
from stages.align.vocabulary_maps import NO_ID, ModelPair
from stages.contract.roles import Role
from stages.models.vocabulary import Vocabulary

NONE: Final = 0
TRANSPORT: Final = 1
GOLD: Final = 2
IDENTITY: Final = 3
CONDITION: Final = 4
"""Outcomes of a position: indices into ``schemas.PAIRED_BY``."""

START_SLOTS: Final = 2**16
"""Distances remembered for the first tokens of texts."""

_ALIKE: Final = 0
_SOURCE_MARKED: Final = 1
_TARGET_MARKED: Final = 2
"""Which model writes what comes next with a space that the text does not have: both or none, the source, the target."""


@dataclass(frozen=True, eq=False)
class AlignedSegment:
    """Result of aligning a segment, for M target positions.

    Attributes:
        pairing: each position's span of source positions.
        source_position: (M,) int32, whose distribution was taken; -1 where none.
        exact_context: (M,) bool, the paired source position conditions on the same text. A position inside a source token
            has no such pair; with ``CONDITION`` its row is conditioned on the same text all the same.
        outcome: (M,) uint8, ``NONE``, ``TRANSPORT``, ``GOLD``, ``IDENTITY`` or ``CONDITION``.
        inner: (M,) uint8, values of ``conditioning.Inner``; all 0 except for ``inexact = "condition"``.
        seen: position -> the bytes of the source token that were read, where the outcome is ``CONDITION``.
        ids: (M, k) int32, descending by probability; -1 at pads. k is ``top_k``, plus the number of draws where the source's
            rows have draws.
        probs: (M, k) float64; 0 at pads.
        tail_mass: (M,) float64; what a row lacks of 1 (0 without a distribution).
        cut_mass: (M,) float64; mass beyond the k largest.
        mass_moved: (M,) float64; share of what landed that is on a token of another text.
        mass_unmapped: (M,) float64; share of the source's mass whose candidates a hard mapping has no token for.
        mass_special: (M,) float64; share of the source's window on special tokens that the target has no counterpart of.
        problems: how the mass moved; None where the source's distributions were copied or none was taken.
    """

    pairing: Pairing
    source_position: np.ndarray
    exact_context: np.ndarray
    outcome: np.ndarray
    inner: np.ndarray
    seen: dict[int, bytes]
    ids: np.ndarray
    probs: np.ndarray
    tail_mass: np.ndarray
    cut_mass: np.ndarray
    mass_moved: np.ndarray
    mass_unmapped: np.ndarray
    mass_special: np.ndarray
    problems: TransportBatch | None


class SegmentAligner:
    """Aligner of the segments of one pair of models; holds everything that segments share.

    Args:
        config: the settings.
        target: the target's tokenizer.
        source: the source's tokenizer.
        pair: the two models, for the costs and maps that the settings need.
    """

    def __init__(self, config: AlignConfig, target: Side, source: Side, pair: ModelPair) -> None:
        self._config = config
        self._target = target
        self._source = source
        self.is_identity = same_vocabulary(target.vocabulary, source.vocabulary)
        if self.is_identity:
            return
        self._pair = pair
        self._transporter = Transporter(config, pair)
        self._start_transporters: dict[bool, Transporter] = {}
        if source.has_dummy_prefix != target.has_dummy_prefix:
            self._start_transporter(target_marked=target.has_dummy_prefix)
        self._counterpart = pair.special_counterpart

    def align(self, target: ModelRows, source: ModelRows) -> AlignedSegment:
        """Align one segment.

        A position whose next token is not trained on never gets a distribution: the last one, which predicts nothing in the
        segment, and in a conversation those before template tokens and in messages that are not trained on.

        Raises:
            ValueError: the two rows are not of the same text, or not of these tokenizers.
        """
        # 1. Pair tokens, and choose the positions that take their partner's distribution.
        config = self._config
        width = config.top_k + source.num_draws
        self._target.check(target)
        self._source.check(source)
        pairing, partner, exact = self._pair_positions(target, source)
        has_label = target.has_label
        taken, written = self._positions_to_take(target, source, partner, exact)  # (M,) each
        # 2. Read the source's candidates there: (P, n), P being the positions taken so far.
        source_ids, source_mass, special = self._source_candidates(
            source, partner[taken], target, np.flatnonzero(taken)
        )
        # Transport needs mass to move, and a prior to move it to; positions without either are dropped.
        usable = source_mass.sum(axis=1) > 0
        if not self.is_identity and config.method == "transport":
            usable &= target.topk_probs[taken, : config.top_k].sum(axis=1) > 0
        taken[taken] = usable
        source_ids, source_mass = source_ids[usable], source_mass[usable]
        mass_special = np.zeros(len(target))
        mass_special[taken] = special[usable]
        # 3. Move the mass to target tokens, including that of the Q positions inside source tokens.
        conditioned, inner = self._condition(target, source)
        problems = None
        if self.is_identity:
            moved = keep_largest(source_ids, source_mass, top_k=width, tail=config.tail)
        else:
            problems = self._transport(
                target, np.flatnonzero(taken), written[taken], source_ids, source_mass, conditioned
            )
            mass = column_mass(problems.plan, self._transporter.projection)  # (P + Q, m)
            moved = keep_largest(problems.support_ids, mass, top_k=width, tail=config.tail)
        # 4. From here on P includes the conditioned positions; rows are in the order of positions, as ``taken`` selects them.
        taken[conditioned.positions] = True
        partner[conditioned.positions] = conditioned.source_position
        # A hard mapping may have no token for any of a position's candidates.
        landed = moved.ids[:, 0] != NO_ID
        taken[taken] = landed
        # 5. Scatter back to all M positions.
        result = _without_distributions(pairing, exact, width, problems)
        result.source_position[taken] = partner[taken]
        result.outcome[taken] = IDENTITY if self.is_identity else TRANSPORT
        result.outcome[conditioned.positions] = CONDITION
        result.inner[:] = inner
        result.seen.update(zip(conditioned.positions.tolist(), conditioned.seen, strict=True))
        result.ids[taken], result.probs[taken] = moved.ids[landed], moved.probs[landed]
        result.tail_mass[taken], result.cut_mass[taken] = moved.tail_mass[landed], moved.cut_mass[landed]
        result.mass_special[taken] = mass_special[taken]
        if problems is not None:
            result.mass_moved[taken] = problems.mass_moved[landed]
            if config.method != "transport":
                result.mass_unmapped[taken] = problems.unmapped_share()[landed]
        # 6. Where contexts differ, teach the gold token. An exact position without a distribution stays without one.
        if config.inexact == "gold":
            gold = np.flatnonzero(has_label & ~exact)
            result.outcome[gold] = GOLD
            result.ids[gold, 0] = target.token_ids[gold + 1]  # the next token: never the one the context ends with
            result.probs[gold, 0] = 1.0
        return result

    def _condition(self, target: ModelRows, source: ModelRows) -> tuple[ConditionedCandidates, np.ndarray]:
        """Condition the source at the positions inside its tokens; none without ``inexact = "condition"``.

        Draws from the tail are not read. What agrees is rescaled, and a draw, which stands for the mass of other tokens too,
        would take all of it where no exact entry agrees.

        Returns:
            The candidates, and the outcome of each target position: (M,) values of ``Inner``.
        """
        config = self._config
        inner = np.full(len(target), Inner.NOT_INNER, np.uint8)
        if config.inexact != "condition" or self.is_identity:
            return ConditionedCandidates.none(), inner
        source_roles, target_roles = self._source.roles_of(source), self._target.roles_of(target)
        positions, boundaries = inner_positions(target, source, target_roles=target_roles, source_roles=source_roles)
        sides = (self._target, self._source)
        seen = seen_bytes(target, source, positions, boundaries, sides=sides, source_roles=source_roles)
        has_prior = target.topk_probs[positions, : config.top_k].sum(axis=1) > 0
        seen = [entry if usable else None for entry, usable in zip(seen, has_prior.tolist(), strict=True)]
        ids, probs = narrow(
            source.exact.topk_ids[boundaries],
            source.exact.topk_probs[boundaries],
            top_k=config.top_k,
            top_p=config.top_p,
        )
        # As wide as the rows of other positions, which may have draws.
        missing = min(source.topk_ids.shape[1], config.top_k + source.num_draws) - ids.shape[1]
        ids, probs = np.pad(ids, ((0, 0), (0, missing)), constant_values=NO_ID), np.pad(probs, ((0, 0), (0, missing)))
        candidates, inner[positions] = condition(seen, ids, probs, self._source, tail=config.tail)
        return candidates, inner

    def _transport(
        self,
        target: ModelRows,
        positions: np.ndarray,
        written: np.ndarray,
        source_ids: np.ndarray,
        source_mass: np.ndarray,
        conditioned: ConditionedCandidates,
    ) -> TransportBatch:
        """Move the mass at P positions, and at those inside source tokens.

        At the start of a text, the source's texts count as they are written there: ``written`` (P,) marks where only one of
        the two models writes a space before the text.
        """
        batches = []
        for where in (_SOURCE_MARKED, _TARGET_MARKED, _ALIKE):
            here = written == where
            if here.any():
                transporter = (
                    self._transporter
                    if where == _ALIKE
                    else self._start_transporter(target_marked=where == _TARGET_MARKED)
                )
                batches.append(transporter.transport(target, positions[here], source_ids[here], source_mass[here]))
        if len(conditioned.positions):
            batches.append(self._transporter.transport_rests(target, conditioned, self._source.vocabulary))
        if not batches:  # no position at all: empty arrays of the right widths
            batches = [self._transporter.transport(target, positions, source_ids, source_mass)]
        return batches[0] if len(batches) == 1 else TransportBatch.joined(batches)

    def _positions_to_take(
        self, target: ModelRows, source: ModelRows, partner: np.ndarray, exact: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the M target positions that are to take their partner's distribution.

        Returns:
            (M,) bool; and (M,) ``_ALIKE``, ``_SOURCE_MARKED`` or ``_TARGET_MARKED``: how the two write what comes next, which
            differs only where a text, or a message, begins on both sides.
        """
        paired = np.flatnonzero(partner != NO_POSITION)
        partners = partner[paired]
        is_start, target_marked = self._target.starts(target)
        source_start, source_marked = self._source.starts(source)
        differs = is_start[paired] & source_start[partners] & (source_marked[partners] != target_marked[paired])
        written = np.full(len(target), _ALIKE, np.uint8)
        written[paired[differs]] = np.where(target_marked[paired[differs]], _TARGET_MARKED, _SOURCE_MARKED)
        taken = np.zeros(len(target), np.bool_)
        taken[paired] = source.predicts_text[partners] & ~(exact & _reads_on(target, source, partner))[paired]
        taken &= target.has_label & (exact | (self._config.inexact == "transport"))
        if self.is_identity and target.roles is not None:  # ids are copied, so both must write the message alike
            taken &= written == _ALIKE
        return taken, written

    def _start_transporter(self, *, target_marked: bool) -> Transporter:
        """Return what moves mass at the start of a text where only one model, the target or the source, writes a space."""
        if target_marked not in self._start_transporters:
            target_writes, source_writes = self._pair.writes_mark
            pair = self._pair.at_text_start(
                source_dummy=not target_marked,
                target_dummy=target_marked,
                source_natural=source_writes != target_marked,
                target_natural=target_writes == target_marked,
            )
            # Few positions per segment: a small table of distances serves them.
            self._start_transporters[target_marked] = Transporter(self._config, pair, cache_slots=START_SLOTS)
        return self._start_transporters[target_marked]

    def landed(self, problems: TransportBatch) -> np.ndarray:
        """Return which candidate's mass lands on which, (P, n, m); see ``landed_mass``."""
        return landed_mass(problems.plan, self._transporter.projection)

    def unpaired(self, target: ModelRows) -> AlignedSegment:
        """Return the result for a segment that the source has no row for: no distribution anywhere."""
        self._target.check(target)
        nothing = np.full(len(target), NO_POSITION, np.int32)
        pairing = Pairing(nothing, nothing.copy(), 0)
        return _without_distributions(pairing, np.zeros(len(target), np.bool_), self._config.top_k, None)

    def _pair_positions(self, target: ModelRows, source: ModelRows) -> tuple[Pairing, np.ndarray, np.ndarray]:
        """Pair the positions; also each target position's one source position, and whether the contexts are the same."""
        source_roles, target_roles = self._source.roles_of(source), self._target.roles_of(target)
        _check_same_text(target, target_roles, source, source_roles)
        if self.is_identity and np.array_equal(target.token_ids, source.token_ids):
            here = np.where(target_roles == Role.TEMPLATE, NO_POSITION, np.arange(len(target))).astype(np.int32)
            pairing = Pairing(here, np.where(here == NO_POSITION, NO_POSITION, here + 1).astype(np.int32), 0)
        elif self._config.pairing == "boundary":
            pairing = boundary_pairing(
                source.byte_end, target.byte_end, source_roles=source_roles, target_roles=target_roles
            )
        else:
            pairing = edit_distance_pairing(
                self._source.pairing_texts(source.token_ids),
                self._target.pairing_texts(target.token_ids),
                source_byte_end=source.byte_end,
                target_byte_end=target.byte_end,
                source_roles=source_roles,
                target_roles=target_roles,
            )
        partner, exact = choose_source(
            pairing, source.byte_end, target.byte_end, source_roles=source_roles, target_roles=target_roles
        )
        return pairing, partner, exact

    def _source_candidates(
        self, source: ModelRows, positions: np.ndarray, target: ModelRows, target_positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the source's window at P positions, as far as it can be moved.

        A special candidate (``<|eot_id|>``) moves only to the target's token of the same role or name, never onto text.
        Where the target has none, or none in a support that is the target's own window, the candidate is left out: its
        mass joins the tail, or is made up by the rest.

        Args:
            source: the source's rows.
            positions: (P,) of the source.
            target: the target's rows.
            target_positions: (P,) of the target.

        Returns:
            ids (P, n), -1 where nothing is moved; the mass a that is moved (P, n); and the mass of the candidates left
            out (P,), as a share of the window's.
        """
        config = self._config
        ids, probs = narrow(
            source.topk_ids[positions],
            source.topk_probs[positions],
            top_k=config.top_k + source.num_draws,
            top_p=config.top_p,
        )
        # Rounded logprobs of a peaked row can sum to a little more than 1.
        window = probs.sum(axis=1)
        special = np.zeros(len(ids))
        if not self.is_identity:
            counterpart = self._counterpart[ids]
            has_place = counterpart != NO_ID
            if config.method == "transport" and config.support == "target":
                target_ids = target.topk_ids[target_positions, : config.top_k]
                has_place &= (target_ids[:, None, :] == counterpart[:, :, None]).any(axis=2)
            movable = (ids != NO_ID) & (~self._source.vocabulary.is_special[ids] | has_place)
            ids, probs = np.where(movable, ids, NO_ID), np.where(movable, probs, 0.0)
            special = 1.0 - np.divide(probs.sum(axis=1), window, out=np.ones_like(window), where=window > 0)
        scale = probs.sum(axis=1) if config.tail == "renormalise" else np.maximum(window, 1.0)
        return ids, np.divide(probs, scale[:, None], out=np.zeros_like(probs), where=scale[:, None] > 0), special


def same_vocabulary(first: Vocabulary, second: Vocabulary) -> bool:
    """Return whether every id means the same in both vocabularies, so that distributions need no transport."""
    return (
        first.token_bytes == second.token_bytes
        and (first.bos_id, first.eos_id) == (second.bos_id, second.eos_id)
        and np.array_equal(first.is_special, second.is_special)
    )


def _check_same_text(target: ModelRows, target_roles: np.ndarray, source: ModelRows, source_roles: np.ndarray) -> None:
    """Refuse rows of different lengths of text. A tokenizer may find no token in a text (whitespace), which is not an error."""
    if (target.roles is None) != (source.roles is None):
        kinds = {True: "plain text", False: "a conversation"}
        raise ValueError(
            f"the target's tokens are from {kinds[target.roles is None]}, the source's of "
            f"{kinds[source.roles is None]}: not the same segment"
        )
    if not ((target_roles == Role.TEXT).any() and (source_roles == Role.TEXT).any()):
        return
    if target.roles is not None:
        _check_same_messages(target, target_roles, source, source_roles)
        return
    target_bytes, source_bytes = int(target.byte_end[-1]), int(source.byte_end[-1])
    if target_bytes != source_bytes:
        raise ValueError(
            f"the target's tokens end at byte {target_bytes}, the source's at byte {source_bytes}: not the same segment"
        )


def _check_same_messages(
    target: ModelRows, target_roles: np.ndarray, source: ModelRows, source_roles: np.ndarray
) -> None:
    """Refuse rows of which one has a turn end where the other has text, or that end elsewhere.

    A template may end the last turn without a token of its own, and it may trim a content. Where both end it, they end at the
    same byte; and the byte at which a turn ends is never one of a content.
    """
    pair = ((target.byte_end, target_roles), (source.byte_end, source_roles))
    last = [
        (int(ends[outside_template[-1]]), roles[outside_template[-1]])
        for ends, roles in pair
        if len(outside_template := np.flatnonzero(roles != Role.TEMPLATE))
    ]
    if all(role == Role.EOS for _, role in last) and len({end for end, _ in last}) > 1:
        raise ValueError(
            f"the target's last turn ends at byte {last[0][0]}, the source's at byte {last[1][0]}: not the same conversation"
        )
    for (ends, roles), (other_ends, other_roles) in (pair, pair[::-1]):
        turn_ends = ends[roles == Role.EOS]
        inside = turn_ends[np.isin(turn_ends, other_ends[other_roles == Role.TEXT])]
        if len(inside):
            raise ValueError(
                f"at byte {int(inside[0])} a turn ends under one tokenizer and a token of a message under the other: not the "
                "same conversation"
            )


def _reads_on(target: ModelRows, source: ModelRows, partner: np.ndarray) -> np.ndarray:
    r"""Find the M target positions before an end of turn whose partner goes on with the next message.

    One token of the source may hold the end of a content and all that its template writes before the next one (``.\n\n``
    between a system message and the user's). What is expected behind it is the next message, not the end of a turn.
    """
    if target.roles is None or source.roles is None:
        return np.zeros(len(target), np.bool_)
    ends_turn = np.append(target.roles.role[1:] == Role.EOS, False)[: len(target)]
    goes_on = np.append(source.roles.role[1:] == Role.TEXT, False)[: len(source)]
    is_paired = partner != NO_POSITION
    reads_on: np.ndarray = ends_turn & is_paired
    reads_on[is_paired] &= goes_on[partner[is_paired]]
    return reads_on


def _without_distributions(
    pairing: Pairing, exact: np.ndarray, width: int, problems: TransportBatch | None
) -> AlignedSegment:
    size = len(exact)
    return AlignedSegment(
        pairing=pairing,
        source_position=np.full(size, NO_POSITION, np.int32),
        exact_context=exact,
        outcome=np.full(size, NONE, np.uint8),
        inner=np.full(size, Inner.NOT_INNER, np.uint8),
        seen={},
        ids=np.full((size, width), NO_ID, np.int32),
        probs=np.zeros((size, width)),
        tail_mass=np.zeros(size),
        cut_mass=np.zeros(size),
        mass_moved=np.zeros(size),
        mass_unmapped=np.zeros(size),
        mass_special=np.zeros(size),
        problems=problems,
    )
