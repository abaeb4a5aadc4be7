"""Align stage: from the logits of source and target to the source's distributions over the target's vocabulary."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa

from stages.align.config import AlignConfig
from stages.align.explain import AlignmentExplanation, explain_position
from stages.align.health import AlignHealth
from stages.align.pair_mass import PairMass, PairSums
from stages.align.rows import ModelRows, Side
from stages.align.segment import IDENTITY, AlignedSegment, SegmentAligner
from stages.align.vocabulary_maps import MAPS_VERSION, ModelPair
from stages.contract import schemas
from stages.contract.columns import (
    PAD_ID,
    SegmentKey,
    SparseRows,
    list_column,
    list_row,
    round_to_half,
    rows_by_segment,
    segment_keys,
    sparse_columns,
    sparse_row,
)
from stages.contract.draws import draws_row, has_draws
from stages.contract.roles import has_roles, roles_of
from stages.contract.stage import BadRecord, StageOutput
from stages.measures.teacher import completed_nll
from stages.models.config import ModelConfig
from stages.models.embeddings import load_input_embeddings
from stages.models.token_tables import IN_MEMORY, TokenTable, TokenTables
from stages.models.tokenizer import Encoding, SegmentTokenizer

logger = logging.getLogger(__name__)


class AlignStage:
    """Stage that aligns one source model with the target.

    ``run`` takes the inputs ``"target"`` and ``"source"`` (tables of ``logits_schema``) and gives ``aligned_schema``: one
    row for every target row. Rows are joined by document and segment; where the source has no such row (it was
    quarantined there) the segment is kept without distributions and counted.

    Where the source's logits have draws from the tail, they are candidates like its exact entries, and a row has as many
    entries more. NLLs and entropies are those of only the exact entries: these are aligned a second time, without the draws.
    The target's draws are not read: its window says where mass may go, and is exact.

    In a conversation only positions whose next token is trained on get a distribution, and only these are counted.

    Health: ``segments``; ``positions`` (with a next token that is trained on), which are the sum of ``one_to_one``,
    ``one_to_many`` (one source token, several target tokens), ``many_to_one`` and ``unpaired``; ``exact_contexts``;
    ``covered`` (with the source's distribution), ``gold_fallback``; ``problems``, ``unconverged``, ``marginal_error`` of the
    transport; ``missing_source_segments`` and ``missing_target_segments``. With ``inexact = "condition"``:
    ``inner_positions``, those inside a source token, which are the sum of ``inner_conditioned`` (with a distribution),
    ``inner_no_context`` (no source distribution before, or bytes that the target's tokens do not spell),
    ``inner_no_candidate``, ``inner_little_mass`` and ``inner_white_space`` (see ``conditioning.Inner``). Means over covered
    positions:

    - ``completed_nll``, ``target_exact_nll``, nats, of the gold next token under the projected distribution, completed by
      the target's own (``stages.measures.teacher``), and under the target; ``source_exact_nll``, of the source's own next
      token at the source position that was taken, where a token follows there and the position is not inside it.
      ``gold_excluded`` counts the positions that ``completed_nll`` is infinite at and leaves out: a row rescaled to 1 that
      does not list the gold token.
    - ``conditioned_nll``, ``conditioned_target_nll``: ``completed_nll`` and ``target_exact_nll`` only inside source tokens.
    - ``floored_nll``, ``target_floored_nll``, nats: under the projected distribution and under the target's own window,
      both rescaled to 1, floored at 1e-4.
    - ``source_entropy``, ``aligned_entropy``, nats, of the source's window (not where it was conditioned) and of the
      projected row, both renormalised.
    - ``mass_moved``: share of what landed that is on a token of another text; ``mass_unmapped``: share of the source's
      mass whose candidates a hard mapping has no token for; ``mass_special``: share of the source's window on special
      tokens without a counterpart, which is left out; ``cut_mass``: mass beyond a row's k largest.
    """

    def __init__(
        self, config: AlignConfig, target: ModelConfig, source: ModelConfig, tables: TokenTables = IN_MEMORY
    ) -> None:
        self._config = config
        self._models = (target, source)
        self._tables = tables

    def prepare(self) -> None:
        """Write the token tables of the two models and the maps between them, so that ``setup`` needs no tokenizer."""
        if self._config.cost == "semantic":  # which reads the target's weights
            for model in self._models:
                self._tables.read(model)
        else:
            self._load()

    def setup(self) -> None:
        """Read what the two tokenizers' ids stand for and the maps between them, and compile the kernels."""
        self._load()
        # Compile the kernels now, so that the first shard's time says what a shard costs.
        tiny = ModelRows(
            token_ids=np.zeros(2, np.int32),
            byte_end=np.arange(1, 3, dtype=np.int32),
            topk_ids=np.zeros((2, 1), np.int32),
            topk_probs=np.ones((2, 1)),
        )
        self._aligner.align(tiny, tiny)

    def _load(self) -> None:
        target, source = (self._tables.read(model) for model in self._models)
        self._target = _side(self._models[0], target)
        self._source = _side(self._models[1], source)
        pair = _model_pair(target, source, *self._models, self._tables)
        self._aligner = SegmentAligner(self._config, self._target, self._source, pair)

    def run(self, inputs: Mapping[str, pa.Table]) -> StageOutput:
        """Align one shard; see the class.

        Raises:
            ValueError: the source's logits have draws, and the rows are to be rescaled to 1.
        """
        target_table, source_table = inputs["target"], inputs["source"]
        if has_draws(source_table) and self._config.tail != "bucket":
            raise ValueError(
                f"the logits of {self._source.name} have draws from the tail (logits.tail_samples), and align.tail = "
                f"{self._config.tail!r} leaves a row no tail: set align.tail = 'bucket', or logits.tail_samples = 0"
            )
        # Rows are joined by (document, segment): either side may have quarantined a segment of the other.
        keys = segment_keys(target_table)
        source_row = rows_by_segment(source_table)
        health = AlignHealth(self._config, missing_target_segments=len(source_row.keys() - set(keys)))
        rows = _OutputRows(self._config, self._target.vocabulary.size, has_draws=has_draws(source_table))
        quarantine: list[BadRecord] = []
        num_tokens = 0
        for row, key in enumerate(keys):
            target = _model_rows(target_table, row, self._target)
            num_tokens += len(target)
            try:
                source = _model_rows(source_table, source_row[key], self._source) if key in source_row else None
                judged = self._aligner.unpaired(target) if source is None else self._aligner.align(target, source)
                aligned = judged
                # With draws a segment is aligned twice: the row with draws is stored, the exact one is judged.
                if source is not None and has_draws(source_table):
                    draws = draws_row(source_table, source_row[key])
                    aligned = self._aligner.align(target, source.with_draws(draws))
            except ValueError as error:  # rows of different texts: this segment's fault, not the shard's
                logger.warning("document %d, segment %d: %s", *key, error)
                quarantine.append(BadRecord(*key, type(error).__name__, str(error)))
                continue
            # Measured after rounding, so that the metrics are those of what fuse will read.
            stored = _as_stored(aligned)
            distributions = stored if judged is aligned else _as_stored(judged)
            completed = _completed_logprob(judged, distributions, target) if has_draws(source_table) else None
            rows.add(key, aligned, stored, completed)
            health.add(aligned, target, source, judged=judged, distributions=distributions)
        if health.missing_source_segments:
            logger.warning("%d segments have no row of %s", health.missing_source_segments, self._source.name)
        return StageOutput(rows.table(), num_tokens, health.metrics(), tuple(quarantine))

    def align_rows(self, target: ModelRows, source: ModelRows) -> AlignedSegment:
        """Align one segment as ``run`` does, from arrays and without rounding: for what no table is kept of.

        Raises:
            ValueError: the two rows are not of the same text, or not of these tokenizers.
        """
        return self._aligner.align(target, source)

    def explain(self, inputs: Mapping[str, pa.Table], row: int, position: int) -> AlignmentExplanation:
        """Explain what ``run`` does at one position.

        Args:
            inputs: input tables, as for ``run``.
            row: row of the target table.
            position: the target position in that row.

        Raises:
            ValueError: the row or position does not exist, or the row cannot be aligned.
        """
        return self._explain(inputs, row)(position)

    def explain_row(self, inputs: Mapping[str, pa.Table], row: int) -> list[AlignmentExplanation]:
        """Explain what ``run`` does at every position of a row of the target table; see ``explain``."""
        explain = self._explain(inputs, row)
        return [explain(position) for position in range(len(inputs["target"]["token_ids"][row]))]

    def pair_mass(self, inputs: Mapping[str, pa.Table], rows: Sequence[int]) -> PairMass:
        """Sum the mass that ``run`` moves from each source token to each target token, in some rows.

        Args:
            inputs: input tables, as for ``run``.
            rows: rows of the target table.

        Raises:
            ValueError: a row does not exist, or cannot be aligned.
        """
        sums = PairSums(self._target.vocabulary)
        align = self._align_row(inputs)
        for row in rows:
            _, _, _, aligned = align(row)
            copied = aligned.outcome == IDENTITY
            sums.add_copied(aligned.ids[copied], aligned.probs[copied])
            if aligned.problems is not None:
                sums.add(aligned.problems, self._aligner.landed(aligned.problems))
        return sums.result()

    def _explain(self, inputs: Mapping[str, pa.Table], row: int) -> Callable[[int], AlignmentExplanation]:
        """Align one row; the result explains any of its positions."""
        key, target, source, aligned = self._align_row(inputs)(row)

        def at(position: int) -> AlignmentExplanation:
            return explain_position(
                doc_id=key[0],
                segment=key[1],
                position=position,
                outcome=schemas.PAIRED_BY[aligned.outcome[position]] if 0 <= position < len(target) else "none",
                target=(self._target, target),
                source=None if source is None else (self._source, source),
                aligned=aligned,
                config=self._config,
            )

        return at

    def _align_row(
        self, inputs: Mapping[str, pa.Table]
    ) -> Callable[[int], tuple[tuple[int, int], ModelRows, ModelRows | None, AlignedSegment]]:
        """Return a function that aligns a row of the target table.

        The function returns the row's key, the target's and the source's rows, and the result.
        """
        target_table, source_table = inputs["target"], inputs["source"]
        keys = segment_keys(target_table)
        source_row = rows_by_segment(source_table)

        def align(row: int) -> tuple[tuple[int, int], ModelRows, ModelRows | None, AlignedSegment]:
            if not 0 <= row < len(keys):
                raise ValueError(f"row {row}: expected 0 to {len(keys) - 1}, the rows of this shard")
            key = keys[row]
            target = _model_rows(target_table, row, self._target)
            source = _model_rows(source_table, source_row[key], self._source) if key in source_row else None
            if source is not None and has_draws(source_table):
                source = source.with_draws(draws_row(source_table, source_row[key]))
            aligned = self._aligner.unpaired(target) if source is None else self._aligner.align(target, source)
            return key, target, source, aligned

        return align


class _OutputRows:
    """Collector of the columns of the aligned table.

    A segment's columns are taken at once and the rest of it is freed: its plans in float64 are twenty times what is
    stored. Every ``_BATCH_POSITIONS`` become Arrow arrays, so that no more than one batch is in memory twice.
    """

    _BATCH_POSITIONS = 65_536

    def __init__(self, config: AlignConfig, vocab_size: int, *, has_draws: bool) -> None:
        self._id_type = schemas.id_type(vocab_size)
        self._schema = schemas.aligned_schema(vocab_size, config.tail, has_draws=has_draws)
        self._batches: list[pa.RecordBatch] = []
        self._start_batch()

    def add(
        self, key: SegmentKey, aligned: AlignedSegment, stored: SparseRows, completed_logprob: np.ndarray | None
    ) -> None:
        """Take one segment.

        Args:
            key: key of the segment.
            aligned: its M positions.
            stored: their distributions, see ``_as_stored``.
            completed_logprob: (M,) of the gold next tokens; None where the schema does not have it.
        """
        self._keys.append(key)
        self._distributions.append(stored)
        arrays = {
            "source_position": aligned.source_position,
            "pair_start": aligned.pairing.start,
            "pair_end": aligned.pairing.end,
            "exact_context": aligned.exact_context,
            "outcome": aligned.outcome,
            "tail_mass": round_to_half(aligned.tail_mass),
        }
        if completed_logprob is not None:
            arrays["completed_logprob"] = completed_logprob
        for name, rows in self._positions.items():
            element = self._schema.field(name).type.value_type.to_pandas_dtype()
            rows.append(arrays[name].astype(element, copy=False))
        self._num_positions += len(stored)
        if self._num_positions >= self._BATCH_POSITIONS:
            self._finish_batch()

    def table(self) -> pa.Table:
        """Return the rows of all segments that were added."""
        self._finish_batch()
        return pa.Table.from_batches(self._batches, schema=self._schema)

    def _start_batch(self) -> None:
        self._keys: list[SegmentKey] = []
        self._distributions: list[SparseRows] = []
        self._positions: dict[str, list[np.ndarray]] = {
            name: [] for name in self._schema.names if name not in ("doc_id", "segment", "topk_ids", "topk_logprobs")
        }
        self._num_positions = 0

    def _finish_batch(self) -> None:
        ids, logprobs = sparse_columns(self._distributions, self._id_type)
        columns = {
            "doc_id": pa.array([doc_id for doc_id, _ in self._keys], pa.int64()),
            "segment": pa.array([segment for _, segment in self._keys], pa.int32()),
            **{
                name: list_column(rows, self._schema.field(name).type.value_type)
                for name, rows in self._positions.items()
            },
            "topk_ids": ids,
            "topk_logprobs": logprobs,
        }
        self._batches.append(pa.record_batch([columns[name] for name in self._schema.names], schema=self._schema))
        self._start_batch()


def _as_stored(aligned: AlignedSegment) -> SparseRows:
    """Return a segment's distributions with the logprobs that are stored of them."""
    with np.errstate(divide="ignore"):
        logprobs = np.log(aligned.probs)
    # A probability can exceed 1 by rounding errors, but no stored logprob may exceed 0.
    stored = np.where(aligned.probs > 0, np.minimum(round_to_half(logprobs), 0.0), -np.inf).astype(np.float32)
    return SparseRows(aligned.ids, stored)


def _completed_logprob(aligned: AlignedSegment, distributions: SparseRows, target: ModelRows) -> np.ndarray:
    """Return ln p(gold next token), completed, under rows as a reader of the aligned table would find them.

    Args:
        aligned: M positions, aligned without draws, with their tails.
        distributions: distributions as stored.
        target: the target's rows.

    Returns:
        (M,) float64, NaN where there is no distribution or no next token.
    """
    assert target.gold_logprob is not None
    return -completed_nll(
        distributions.ids,
        np.exp(distributions.logprobs.astype(np.float64)),
        round_to_half(aligned.tail_mass).astype(np.float64),
        np.append(target.token_ids[1:], PAD_ID)[: len(target)],
        own_ids=target.topk_ids,
        own_probs=target.topk_probs,
        own_gold_logprob=target.gold_logprob,
    )


@lru_cache(maxsize=1)
def _model_pair(
    target: TokenTable, source: TokenTable, target_model: ModelConfig, source_model: ModelConfig, tables: TokenTables
) -> ModelPair:
    """Return the two models with the maps between their vocabularies, which the stages of a comparison share.

    Args:
        target: the target's token table.
        source: the source's.
        target_model: the target, for its tokenizer and its embeddings, which are loaded where they are needed.
        source_model: the source, for its tokenizer.
        tables: keep the maps.
    """
    return ModelPair(
        source=source.vocabulary,
        target=target.vocabulary,
        source_texts=source.texts,
        target_texts=target.texts,
        encode=lambda texts: _encode(target_model, texts),
        encode_source=lambda texts: _encode(source_model, texts),
        load_embeddings=lambda: load_input_embeddings(target_model),
        keep=tables.keep(source_model, target_model, MAPS_VERSION),
    )


def _encode(model: ModelConfig, texts: list[str]) -> list[Encoding]:
    return SegmentTokenizer.load(model).encode_batch(texts, is_last=[False] * len(texts))


def _side(model: ModelConfig, table: TokenTable) -> Side:
    return Side(
        model.name,
        table.vocabulary,
        table.prefix_id,
        table.has_dummy_prefix,
        table.texts,
        spells_text=table.spells_text,
    )


def _model_rows(table: pa.Table, row: int, side: Side) -> ModelRows:
    topk = sparse_row(table, row)
    eos_id = side.vocabulary.eos_id
    return ModelRows(
        token_ids=np.array(list_row(table, "token_ids", row), np.int32),
        byte_end=np.array(list_row(table, "byte_end", row), np.int32),
        topk_ids=topk.ids,
        topk_probs=np.exp(topk.logprobs.astype(np.float64)),
        gold_logprob=np.array(list_row(table, "gold_logprob", row), np.float32),
        roles=roles_of(table, row, prefix_id=side.prefix_id, eos_id=eos_id) if has_roles(table) else None,
    )
