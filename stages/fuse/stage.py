"""Fuse stage: one distribution per position from the target's and the sources', and the training blocks."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa

from stages.contract.columns import (
    PAD_ID,
    SparseRows,
    list_row,
    round_to_half,
    sparse_row,
)
from stages.contract.manifest import Mean
from stages.contract.roles import Role, has_roles, roles_of
from stages.contract.schemas import fused_schema
from stages.contract.stage import StageOutput
from stages.fuse.blocks import SegmentColumns, block_table
from stages.fuse.config import FuseConfig
from stages.fuse.explanation import ExplainedCandidate, FusionExplanation
from stages.fuse.fit import fixed_weights
from stages.fuse.health import HealthCounts
from stages.fuse.inputs import FuseInputs, read_inputs
from stages.fuse.mix import Candidate, Mixture, mix, mixed_gold_logprob, without
from stages.fuse.pack import Packing, pack
from stages.fuse.weights import block_cross_entropy, candidate_weights, token_cross_entropy
from stages.measures.cross_entropy import CrossEntropy, cross_entropy, learnt_cross_entropy
from stages.measures.teacher import completed_nll, exact_nll
from stages.models.config import ModelConfig
from stages.models.token_tables import IN_MEMORY, TokenTables
from stages.models.vocabulary import Vocabulary

_NO_CROSS_ENTROPY: Final = CrossEntropy(0.0, 0, 0)


@dataclass(frozen=True)
class FusedSegment:
    """Fused distributions of one segment: N positions, C candidates, the target's own first.

    Attributes:
        candidates: C; none has a distribution where the next token is not trained on, as at the last position.
        next_ids: (N,) the next token; ``PAD_ID`` at the last position.
        gold: (N,) the next token where it is trained on, else ``PAD_ID``.
        cross_entropy: (N, C) in the configured unit over the configured span; NaN if unknown.
        weights: (N, C), see ``candidate_weights``.
        mixture: weighted union of the candidates.
        chosen_by_gold: (N,) bool; the gold next token itself decided what the fused distribution is: granularity
            ``"token"`` chose between candidates, or a candidate that counts has all its mass on it (``inexact = "gold"``).
        short_context: (N,) bool; the block begins too shortly before the position: what is predicted there is conditioned
            on text that the block does not hold, so there is no fused distribution.
        mixed_gold_logprob: (N,) gold logprobs by which fused distributions with draws are judged, see
            ``mix.mixed_gold_logprob``; None where rows are exact.
    """

    candidates: tuple[Candidate, ...]
    next_ids: np.ndarray
    gold: np.ndarray
    cross_entropy: np.ndarray
    weights: np.ndarray
    mixture: Mixture
    chosen_by_gold: np.ndarray
    short_context: np.ndarray
    mixed_gold_logprob: np.ndarray | None = None

    @property
    def present(self) -> np.ndarray:
        """Whether each position has a fused distribution, (N,) bool."""
        return self.mixture.rows.present

    @property
    def chosen(self) -> np.ndarray:
        """Index of the candidate with the largest weight, (N,) int8; -1 where there is no fused distribution."""
        return np.where(self.present, self.weights.argmax(axis=1), -1).astype(np.int8)


class GoldNll(NamedTuple):
    """Negative log-probabilities that the candidates give the gold tokens of T positions.

    Attributes:
        nll: (T, C) float32, completed, nats.
        doc_ids: (T,) the document that each position is in.
    """

    nll: np.ndarray
    doc_ids: np.ndarray


class FuseStage:
    """Stage that chooses or mixes the candidates at each position, and packs segments into blocks.

    Inputs: ``"logits/<name>"`` of the target and of every source, ``"align/<name>"`` of every source. With
    ``function = "fitted"`` also ``"fit"``, the weights (``kind``, null for the whole text, and ``weights``, a list in the
    order of the candidates), and with ``per = "kind"`` ``"kinds"``, the kind of each document (``doc_id``, ``kind``).

    Where the logits have m draws from the tail at each position, a fused row has up to m entries more for each candidate. What
    a candidate gives the gold token is then never read off its row: for an aligned row the table says what its exact entries
    give (``completed_logprob``), for the target's own its table says what the whole vocabulary gives.

    In a conversation, only positions whose next token is trained on have candidates, and cross-entropies cover only tokens that
    are trained on. Conversations are packed whole.
    """

    def __init__(
        self,
        config: FuseConfig,
        target: ModelConfig,
        sources: tuple[ModelConfig, ...],
        tables: TokenTables = IN_MEMORY,
    ) -> None:
        self.config = config
        self._tables = tables
        self.target = target
        self.sources = sources
        self.names = (target.name, *(source.name for source in sources))
        self._vocabularies: tuple[Vocabulary, ...] = ()

    def setup(self) -> None:
        """Read the token tables: which tokens are special, and the size of the target's vocabulary."""
        self._vocabularies = tuple(self._tables.read(model).vocabulary for model in (self.target, *self.sources))

    def run(self, inputs: Mapping[str, pa.Table]) -> StageOutput:
        """Fuse one shard.

        Raises:
            ValueError: the aligned tables disagree on their tail or on draws, or do not fit the target's positions; or
                conversations are to be cut.
        """
        shard = self._inputs(inputs)
        packing = self._pack(shard)
        health = HealthCounts(self.names, top_k=self.config.top_k, has_tail=shard.tail == "bucket")
        segments = []
        num_short = 0
        for row, fused in enumerate(self._fuse_rows(shard, packing, range(len(shard.lengths)))):
            num_short += int(fused.short_context.sum())
            health.add(
                mixture=fused.mixture,
                target=sparse_row(shard.target, row),
                gold=fused.gold,
                gold_logprob=list_row(shard.target, "gold_logprob", row),
                chosen=fused.chosen,
                chosen_by_gold=fused.chosen_by_gold,
                mixed_gold_logprob=fused.mixed_gold_logprob,
            )
            rows = fused.mixture.rows
            rows = SparseRows(rows.ids, round_to_half(rows.logprobs))
            segments.append(SegmentColumns(rows, round_to_half(fused.mixture.tail_mass), fused.chosen))
        vocab_size = self._vocabularies[0].size
        schema = fused_schema(vocab_size, shard.tail, self.names, conversations=has_roles(shard.target))
        return StageOutput(
            table=block_table(shard.target, packing, segments, schema),
            num_tokens=int(shard.lengths.sum()),
            health={
                "segments": len(shard.lengths),
                "blocks": packing.num_blocks,
                "block_fill": Mean(total=float(shard.lengths.sum()), count=packing.num_blocks * self.config.max_length),
                "short_context": num_short,
                **health.metrics(),
                "missing_source_segments": int((shard.aligned_rows < 0).sum()),
            },
        )

    def gold_nll(self, inputs: Mapping[str, pa.Table]) -> GoldNll:
        """Compute how well each candidate predicts the gold tokens of a shard, which weights are fitted on.

        Args:
            inputs: the logits and the aligned tables, as for ``run``.

        Returns:
            The positions at which all candidates have a distribution, and none has all its mass on the gold token.
        """
        shard = self._inputs(inputs)
        segment_nlls = [self._segment_gold_nll(shard, row) for row in range(len(shard.lengths))]
        counts = [len(segment_nll) for segment_nll in segment_nlls]
        nll = np.concatenate(segment_nlls) if segment_nlls else np.empty((0, len(self.names)), np.float32)
        return GoldNll(nll, np.repeat(shard.doc_ids, counts))

    def _segment_gold_nll(self, shard: FuseInputs, row: int) -> np.ndarray:
        candidates = shard.candidates(row)
        gold = list_row(shard.target, "token_ids", row)[1:].astype(np.int64)
        target_rows = candidates[0].rows
        target_probs = np.exp(target_rows.logprobs[:-1].astype(np.float64))
        gold_logprob = list_row(shard.target, "gold_logprob", row)[:-1]
        columns = [exact_nll(gold_logprob, np.arange(len(gold)))]
        for candidate in candidates[1:]:
            columns.append(
                -candidate.gold_logprob[:-1]
                if candidate.gold_logprob is not None
                else completed_nll(
                    candidate.rows.ids[:-1],
                    np.exp(candidate.rows.logprobs[:-1].astype(np.float64)),
                    candidate.tail_mass[:-1],
                    gold,
                    own_ids=target_rows.ids[:-1],
                    own_probs=target_probs,
                    own_gold_logprob=gold_logprob,
                )
            )
        nll = np.stack(columns, axis=1).astype(np.float32)
        is_gold = shard.gold_rows(row)[:-1].any(axis=1)
        return nll[target_rows.present[:-1] & np.isfinite(nll).all(axis=1) & ~is_gold]

    def explain(self, inputs: Mapping[str, pa.Table], row: int, position: int) -> FusionExplanation:
        """Explain the fused distribution of one position, for ``ptafuse inspect``.

        Args:
            inputs: input tables, as for ``run``.
            row: the segment's row in the target's logits table; ``find_row`` gives it.
            position: position of the target's tokens in that segment; ``locate`` gives it for a position of a block.

        Raises:
            IndexError: the row or position does not exist.
        """
        shard = self._inputs(inputs)
        if not 0 <= row < len(shard.lengths) or not 0 <= position < shard.lengths[row]:
            extent = f"{shard.lengths[row]} tokens" if 0 <= row < len(shard.lengths) else f"{len(shard.lengths)} rows"
            raise IndexError(f"no position {position} in row {row}: the shard has {extent} there")
        return self._explained(self._fuse_row(shard, row), position)

    def fused_segments(self, inputs: Mapping[str, pa.Table], rows: Sequence[int]) -> Iterator[FusedSegment]:
        """Yield the candidates of some segments and the fused result of ``run``, one segment at a time.

        Args:
            inputs: input tables of the whole shard, as for ``run``, since candidates are judged on documents or blocks of it.
            rows: rows of the target's logits table.
        """
        shard = self._inputs(inputs)
        yield from self._fuse_rows(shard, self._pack(shard), rows)

    def explain_row(self, inputs: Mapping[str, pa.Table], row: int) -> list[FusionExplanation]:
        """Explain the fused distributions of a segment, position by position; see ``explain``."""
        shard = self._inputs(inputs)
        fused = self._fuse_row(shard, row)
        return [self._explained(fused, position) for position in range(int(shard.lengths[row]))]

    def _pack(self, shard: FuseInputs) -> Packing:
        if self.config.packing == "cut" and has_roles(shard.target):
            raise ValueError(
                "fuse.packing = 'cut' cuts segments at block boundaries, and these are conversations, which must stay "
                "whole: set fuse.packing = 'whole'"
            )
        return pack(shard.lengths, max_length=self.config.max_length, packing=self.config.packing)

    def _fuse_row(self, shard: FuseInputs, row: int) -> FusedSegment:
        return next(self._fuse_rows(shard, self._pack(shard), [row]))

    def _fuse_rows(self, shard: FuseInputs, packing: Packing, rows: Iterable[int]) -> Iterator[FusedSegment]:
        piece_ce = self._piece_cross_entropy(shard, packing)
        return (self._fuse_segment(shard, row, packing, piece_ce) for row in rows)

    def _explained(self, fused: FusedSegment, position: int) -> FusionExplanation:
        vocabulary = self._vocabularies[0]
        following, chosen = int(fused.next_ids[position]), int(fused.chosen[position])
        candidates = tuple(
            ExplainedCandidate(
                name=name,
                cross_entropy=float(fused.cross_entropy[position, index]),
                weight=float(fused.weights[position, index]),
                distribution=_as_text(candidate.rows, position, vocabulary),
                tail_mass=float(candidate.tail_mass[position]),
            )
            for index, (name, candidate) in enumerate(zip(self.names, fused.candidates, strict=True))
        )
        return FusionExplanation(
            gold=None if following == PAD_ID else vocabulary.text(following),
            is_learnt=bool(fused.gold[position] != PAD_ID),
            candidates=candidates,
            chosen=None if chosen < 0 else self.names[chosen],
            fused=_as_text(fused.mixture.rows, position, vocabulary),
            tail_mass=float(fused.mixture.tail_mass[position]),
        )

    def _inputs(self, inputs: Mapping[str, pa.Table]) -> FuseInputs:
        return read_inputs(inputs, self.target.name, [source.name for source in self.sources])

    def _piece_cross_entropy(self, shard: FuseInputs, packing: Packing) -> np.ndarray:
        """Compute the models' cross-entropy, in the configured unit and span, at each piece, (P, C).

        Unknown values are NaN.
        """
        if self.config.granularity == "token":  # judged at each position from the candidates themselves
            return np.full((len(packing.segment), len(self.names)), np.nan)
        first_byte = shard.first_bytes()
        values = np.stack(
            [self._segment_values(shard, column, first_byte) for column in range(len(self.names))], axis=1
        )
        if self.config.granularity == "block":
            return block_cross_entropy(values, packing.segment, packing.block)[packing.block]
        return values[packing.segment]

    def _segment_values(self, shard: FuseInputs, column: int, first_byte: np.ndarray) -> np.ndarray:
        """Compute one model's cross-entropy, in the configured unit, per segment or whole document, (S,)."""
        table = shard.target if column == 0 else shard.logits[column - 1]
        rows = np.arange(len(shard.lengths)) if column == 0 else shard.logits_rows[:, column - 1]
        is_special = self._vocabularies[column].is_special
        values = [
            _segment_cross_entropy(table, int(row), is_special, first_byte=int(first))
            for row, first in zip(rows, first_byte, strict=True)
        ]
        if self.config.granularity == "document":
            totals: dict[int, CrossEntropy] = {}
            for doc_id, value in zip(shard.doc_ids.tolist(), values, strict=True):
                totals[doc_id] = totals.get(doc_id, _NO_CROSS_ENTROPY) + value
            values = [totals[doc_id] for doc_id in shard.doc_ids.tolist()]
        per_byte = self.config.unit == "bits-per-byte"
        return np.array([value.bits_per_byte if per_byte else value.nats_per_token for value in values], np.float64)

    def _fuse_segment(self, shard: FuseInputs, row: int, packing: Packing, piece_ce: np.ndarray) -> FusedSegment:
        length = int(shard.lengths[row])
        next_ids = np.append(list_row(shard.target, "token_ids", row)[1:].astype(np.int64), PAD_ID)[:length]
        gold = np.where(shard.has_label(row), next_ids, PAD_ID)
        pieces = packing.pieces_of(row)
        short_context = self._short_context(packing, pieces, length) & (gold != PAD_ID)
        candidates = tuple(without(candidate, short_context) for candidate in shard.candidates(row))
        if self.config.uncovered == "none":
            is_covered = np.any([candidate.rows.present for candidate in candidates[1:]], axis=0)
            candidates = (without(candidates[0], ~is_covered), *candidates[1:])
        if self.config.granularity == "token":
            judged = token_cross_entropy(candidates, gold)
        else:
            judged = np.repeat(piece_ce[pieces], packing.length[pieces], axis=0)
        present = np.stack([candidate.rows.present for candidate in candidates], axis=1)
        weights = self._weights(shard, row, judged, present)
        top_k = self.config.top_k + shard.num_draws * len(candidates)
        mixture = mix(candidates, weights, top_k=top_k, renormalise=shard.tail == "renormalise")
        is_gold = shard.gold_rows(row) & (weights > 0)
        is_judged = self.config.function in ("min-ce", "avg-ce")
        is_choice = (present.sum(axis=1) > 1) & (self.config.granularity == "token") & is_judged
        chosen_by_gold = is_gold.any(axis=1) | is_choice
        mixed = mixed_gold_logprob(candidates, weights)
        return FusedSegment(candidates, next_ids, gold, judged, weights, mixture, chosen_by_gold, short_context, mixed)

    def _weights(self, shard: FuseInputs, row: int, judged: np.ndarray, present: np.ndarray) -> np.ndarray:
        """Compute the candidates' weights at each position of a segment, (N, C)."""
        if self.config.function == "fitted":
            assert shard.fitted is not None
            return fixed_weights(shard.fitted[row], present)
        if self.config.function == "target":
            return fixed_weights(np.eye(len(self.names))[0], present)
        return candidate_weights(judged, present, function=self.config.function)

    def _short_context(self, packing: Packing, pieces: np.ndarray, length: int) -> np.ndarray:
        """Mark positions of a segment that begin a block inside it, nearer to the cut than ``min_context``, (N,) bool."""
        offset = np.repeat(packing.offset[pieces], packing.length[pieces])
        return (offset > 0) & (np.arange(length) - offset < self.config.min_context)


def _segment_cross_entropy(table: pa.Table, row: int, is_special: np.ndarray, *, first_byte: int) -> CrossEntropy:
    """Compute the cross-entropy of one row of a logits table; nothing is counted if ``row`` is -1."""
    if row < 0:
        return _NO_CROSS_ENTROPY
    token_ids = list_row(table, "token_ids", row)
    gold_logprob, byte_end = list_row(table, "gold_logprob", row), list_row(table, "byte_end", row)
    if has_roles(table):
        roles = roles_of(table, row, prefix_id=None, eos_id=None)
        return learnt_cross_entropy(
            gold_logprob,
            byte_end,
            is_trained=roles.is_trained,
            ends_turn=roles.role == Role.EOS,
            first_byte=first_byte,
        )
    return cross_entropy(gold_logprob, byte_end, is_special[token_ids.astype(np.int64)], first_byte=first_byte)


def _as_text(rows: SparseRows, position: int, vocabulary: Vocabulary) -> tuple[tuple[str, float], ...]:
    pairs = zip(rows.ids[position].tolist(), np.exp(rows.logprobs[position]).tolist(), strict=True)
    return tuple((vocabulary.text(token_id), prob) for token_id, prob in pairs if token_id != PAD_ID)
