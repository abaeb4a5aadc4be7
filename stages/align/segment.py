"""One segment: from the two models' rows to a distribution over the target's vocabulary at each target position."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from stages.align.config import AlignConfig
from stages.align.distance import PairDistances
from stages.align.pairing import (
    NO_POSITION,
    ROLE_TEXTS,
    Pairing,
    Role,
    boundary_pairing,
    choose_source,
    edit_distance_pairing,
    token_roles,
)
from stages.align.projection import column_mass, keep_largest
from stages.align.support import NO_ID, target_support, union_support
from stages.align.transport import semi_relaxed, sinkhorn
from stages.contract.tokens import Vocabulary

NONE: Final = 0
TRANSPORT: Final = 1
GOLD: Final = 2
IDENTITY: Final = 3
"""Outcomes of a position: indices into ``schemas.PAIRED_BY``."""


@dataclass(frozen=True, eq=False)
class ModelRows:
    """What one model says about a segment of N tokens.

    Attributes:
        token_ids: (N,) int32.
        byte_end: (N,) int32, nondecreasing.
        topk_ids: (N, k) int32, descending by probability; -1 at pads.
        topk_probs: (N, k) float64; 0 at pads.
    """

    token_ids: np.ndarray
    byte_end: np.ndarray
    topk_ids: np.ndarray
    topk_probs: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, eq=False)
class Side:
    """One model's tokenizer, as far as aligning needs it.

    Attributes:
        name: of the model, for messages.
        vocabulary: V tokens.
        prepends_bos: its segments begin with BOS.
        texts: (V,) each token's text, decoded.
    """

    name: str
    vocabulary: Vocabulary
    prepends_bos: bool
    texts: tuple[str, ...]

    def roles(self, token_ids: np.ndarray) -> np.ndarray:
        """(N,) the role of each token of a segment."""
        vocabulary = self.vocabulary
        return token_roles(
            token_ids, bos_id=vocabulary.bos_id, eos_id=vocabulary.eos_id, prepends_bos=self.prepends_bos
        )

    def pairing_texts(self, token_ids: np.ndarray, roles: np.ndarray) -> list[str]:
        """Texts for the pairing's edit distance: without marker, special tokens by role."""
        return [
            self.vocabulary.pairing_text(token_id) if role == Role.TEXT else ROLE_TEXTS[Role(role)]
            for token_id, role in zip(token_ids.tolist(), roles.tolist(), strict=True)
        ]

    def check(self, rows: ModelRows) -> None:
        """Refuse rows that another tokenizer must have made.

        Raises:
            ValueError: an id that this vocabulary does not have, or tokens that go back in the text.
        """
        for what, ids in (("token", rows.token_ids), ("candidate", rows.topk_ids)):
            largest = int(ids.max(initial=NO_ID))
            if largest >= self.vocabulary.size:
                raise ValueError(
                    f"{self.name}: {what} id {largest}, but its tokenizer has {self.vocabulary.size} tokens; were the logits "
                    "made with another tokenizer?"
                )
        if (np.diff(rows.byte_end) < 0).any():
            raise ValueError(
                f"{self.name}: byte_end decreases at token {int(np.argmax(np.diff(rows.byte_end) < 0)) + 1}"
            )


@dataclass(frozen=True, eq=False)
class Problems:
    """The transport problems of a segment, P of them, and their solutions.

    Attributes:
        positions: (P,) target positions.
        source_ids: (P, n) source candidates; -1 at pads.
        source_mass: (P, n) a, the source marginal.
        support_ids: (P, m) target candidates; -1 at pads.
        prior: (P, m) b, the target marginal or prior; sums to 1.
        cost: (P, n, m) edits.
        plan: (P, n, m).
        marginal_error: (P,) largest violation of a marginal that binds, relative to the source's mass.
        converged: (P,) bool.
    """

    positions: np.ndarray
    source_ids: np.ndarray
    source_mass: np.ndarray
    support_ids: np.ndarray
    prior: np.ndarray
    cost: np.ndarray
    plan: np.ndarray
    marginal_error: np.ndarray
    converged: np.ndarray


@dataclass(frozen=True, eq=False)
class AlignedSegment:
    """The result, for M target positions.

    Attributes:
        pairing: each position's span of source positions.
        source_position: (M,) int32, whose distribution was taken; -1 where none.
        exact_context: (M,) bool, the paired source position conditions on the same text.
        outcome: (M,) uint8, ``NONE``, ``TRANSPORT``, ``GOLD`` or ``IDENTITY``.
        ids: (M, k) int32, descending by probability; -1 at pads.
        probs: (M, k) float64; 0 at pads.
        tail_mass: (M,) float64; what a row lacks of 1 (0 without a distribution).
        cut_mass: (M,) float64; mass beyond the k largest.
        problems: the transport problems; None where none was needed.
    """

    pairing: Pairing
    source_position: np.ndarray
    exact_context: np.ndarray
    outcome: np.ndarray
    ids: np.ndarray
    probs: np.ndarray
    tail_mass: np.ndarray
    cut_mass: np.ndarray
    problems: Problems | None


class SegmentAligner:
    """Aligns segments of one pair of models; holds what does not change from one to the next.

    Args:
        config: the settings.
        target: the target's tokenizer.
        source: the source's tokenizer.
        first_token: (V of the source,) from ``support.prefix_map``; only a union support reads it.
    """

    def __init__(self, config: AlignConfig, target: Side, source: Side, first_token: np.ndarray | None) -> None:
        self._config = config
        self._target = target
        self._source = source
        self._first_token = first_token
        self.is_identity = same_vocabulary(target.vocabulary, source.vocabulary)
        if not self.is_identity:
            if config.support == "union" and first_token is None:
                raise ValueError("support = 'union' needs the prefix map of the two vocabularies")
            self._distances = PairDistances(source.texts, target.texts)

    def align(self, target: ModelRows, source: ModelRows) -> AlignedSegment:
        """Align one segment.

        The last position predicts nothing in the segment, so it never gets a distribution.

        Raises:
            ValueError: the two rows are not of the same text, or not of these tokenizers.
        """
        config = self._config
        self._target.check(target)
        self._source.check(source)
        pairing, partner, exact = self._pair(target, source)
        has_next = np.arange(len(target)) < len(target) - 1
        taken = has_next & (partner != NO_POSITION) & (exact | (config.inexact == "transport"))
        source_ids, source_mass = self._source_candidates(source, partner[taken])
        usable = source_mass.sum(axis=1) > 0
        if not self.is_identity:
            usable &= target.topk_probs[taken, : config.top_k].sum(axis=1) > 0
        taken[taken] = usable
        problems = None
        if self.is_identity:
            moved = keep_largest(source_ids[usable], source_mass[usable], top_k=config.top_k, tail=config.tail)
        else:
            problems = self._transport(target, np.flatnonzero(taken), source_ids[usable], source_mass[usable])
            mass = column_mass(problems.plan, config.projection)
            moved = keep_largest(problems.support_ids, mass, top_k=config.top_k, tail=config.tail)
        result = _without_distributions(pairing, exact, config.top_k, problems)
        result.source_position[taken] = partner[taken]
        result.outcome[taken] = IDENTITY if self.is_identity else TRANSPORT
        result.ids[taken], result.probs[taken] = moved.ids, moved.probs
        result.tail_mass[taken], result.cut_mass[taken] = moved.tail_mass, moved.cut_mass
        if config.inexact == "gold":
            gold = np.flatnonzero(has_next & ~taken)
            result.outcome[gold] = GOLD
            result.ids[gold, 0] = target.token_ids[gold + 1]  # the next token: never the one the context ends with
            result.probs[gold, 0] = 1.0
        return result

    def unpaired(self, target: ModelRows) -> AlignedSegment:
        """The result for a segment of which the source has no row: no distribution anywhere."""
        self._target.check(target)
        nothing = np.full(len(target), NO_POSITION, np.int32)
        pairing = Pairing(nothing, nothing.copy(), 0)
        return _without_distributions(pairing, np.zeros(len(target), np.bool_), self._config.top_k, None)

    def _pair(self, target: ModelRows, source: ModelRows) -> tuple[Pairing, np.ndarray, np.ndarray]:
        """The pairing, and each target position's one source position with whether the contexts are the same."""
        source_roles, target_roles = self._source.roles(source.token_ids), self._target.roles(target.token_ids)
        _check_same_text(target, target_roles, source, source_roles)
        if self.is_identity and np.array_equal(target.token_ids, source.token_ids):
            here = np.arange(len(target), dtype=np.int32)
            pairing = Pairing(here, here + 1, 0)
        elif self._config.pairing == "boundary":
            pairing = boundary_pairing(
                source.byte_end, target.byte_end, source_roles=source_roles, target_roles=target_roles
            )
        else:
            pairing = edit_distance_pairing(
                self._source.pairing_texts(source.token_ids, source_roles),
                self._target.pairing_texts(target.token_ids, target_roles),
            )
        partner, exact = choose_source(
            pairing, source.byte_end, target.byte_end, source_roles=source_roles, target_roles=target_roles
        )
        return pairing, partner, exact

    def _source_candidates(self, source: ModelRows, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source's window at these positions: ids (P, n) and the mass a that is moved (P, n)."""
        window = slice(self._config.top_k)
        ids, probs = source.topk_ids[positions, window], source.topk_probs[positions, window]
        total = probs.sum(axis=1, keepdims=True)
        # Rounded logprobs of a peaked row can sum to a little more than 1.
        scale = total if self._config.tail == "renormalise" else np.maximum(total, 1.0)
        return ids, np.divide(probs, scale, out=np.zeros_like(probs), where=scale > 0)

    def _transport(
        self, target: ModelRows, positions: np.ndarray, source_ids: np.ndarray, source_mass: np.ndarray
    ) -> Problems:
        config = self._config
        window = slice(config.top_k)
        target_ids, target_probs = target.topk_ids[positions, window], target.topk_probs[positions, window]
        if config.support == "union":
            assert self._first_token is not None
            support_ids, prior = union_support(target_ids, target_probs, source_ids, self._first_token)
        else:
            support_ids, prior = target_support(target_ids, target_probs)
        cost = self._distances.costs(source_ids, support_ids)
        total = source_mass.sum(axis=1)
        share = source_mass / total[:, None]
        if config.marginals == "balanced":
            plan, error, converged, _ = sinkhorn(
                cost,
                share,
                prior,
                epsilon=config.epsilon,
                tolerance=config.tolerance,
                max_iterations=config.max_iterations,
            )
        else:
            plan = semi_relaxed(cost, share, prior, epsilon=config.epsilon)
            error = np.abs(plan.sum(axis=2) - share).max(axis=1, initial=0.0)
            converged = np.ones(len(positions), np.bool_)
        plan = plan * total[:, None, None]
        return Problems(positions, source_ids, source_mass, support_ids, prior, cost, plan, error, converged)


def same_vocabulary(first: Vocabulary, second: Vocabulary) -> bool:
    """Every id stands for the same in both, so that distributions need no transport."""
    return (
        first.token_bytes == second.token_bytes
        and (first.bos_id, first.eos_id) == (second.bos_id, second.eos_id)
        and np.array_equal(first.is_special, second.is_special)
    )


def _check_same_text(target: ModelRows, target_roles: np.ndarray, source: ModelRows, source_roles: np.ndarray) -> None:
    """Refuse rows of different lengths of text. A tokenizer may find no token in a text (white space): that is no error."""
    if (target_roles == Role.TEXT).any() and (source_roles == Role.TEXT).any():
        target_bytes, source_bytes = int(target.byte_end[-1]), int(source.byte_end[-1])
        if target_bytes != source_bytes:
            raise ValueError(
                f"the target's tokens end at byte {target_bytes}, the source's at byte {source_bytes}: not the same segment"
            )


def _without_distributions(
    pairing: Pairing, exact: np.ndarray, top_k: int, problems: Problems | None
) -> AlignedSegment:
    size = len(exact)
    return AlignedSegment(
        pairing=pairing,
        source_position=np.full(size, NO_POSITION, np.int32),
        exact_context=exact,
        outcome=np.full(size, NONE, np.uint8),
        ids=np.full((size, top_k), NO_ID, np.int32),
        probs=np.zeros((size, top_k)),
        tail_mass=np.zeros(size),
        cut_mass=np.zeros(size),
        problems=problems,
    )
