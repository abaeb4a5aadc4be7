"""``ptafuse compare``: the teacher NLL of all alignment methods on the same positions, from finished logits only.

It measures the value of an alignment before any training is paid for. Everything is computed in this process, on a sample
of the shards, and nothing is written.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from rich.console import Console

from pipeline.run.resolve import resolve
from pipeline.run.session import Run, read_inputs, require_complete
from pipeline.run.shard_plan import evenly_spread
from pipeline.run.steps import Request
from pipeline.settings.load import load_config
from pipeline.settings.run import RunConfig
from stages.align.config import PRESETS, AlignConfig
from stages.align.stage import AlignStage
from stages.align.teacher import SharedNll, compare_shared, top_k_nll
from stages.contract.columns import list_row, rows_by_segment, sparse_row
from stages.contract.draws import without_draws
from stages.contract.roles import has_roles
from stages.contract.store import Store
from stages.measures.teacher import completed_nll, exact_nll, floored_nll
from stages.models.config import ModelConfig
from stages.models.token_tables import TokenTables

log = logging.getLogger(__name__)

SAMPLE_TOKENS: Final = 100_000
"""Target tokens that are compared where the command does not say how many shards: some 20 s of computing."""

PAIRINGS: Final = ("edit-distance", "boundary")
TARGET_ROW: Final = "target itself"
SOURCE_ROW: Final = "source itself"
CONDITIONED: Final = "conditioned"
"""The row of ``semi-relaxed`` that also covers positions inside a source token."""


@dataclass(frozen=True)
class AlignmentVariant:
    """One alignment method: a row of the table.

    Attributes:
        name: a preset, a method, ``CONDITIONED``, or ``"as configured"``.
        settings: all of it.
        is_configured: it is what the configuration says, except for ``tail``, which all rows share, and ``inexact``, which all
            share that do not condition. A bucket row and one rescaled to 1 differ only by that, so all are aligned with
            their tails.
    """

    name: str
    settings: AlignConfig
    is_configured: bool = False

    @property
    def epsilon(self) -> float | None:
        """Epsilon; None if the method does not use it."""
        return self.settings.epsilon if self.settings.method == "transport" else None

    @property
    def label(self) -> str:
        """Label that is unique among the rows."""
        epsilon = "" if self.epsilon is None else f", epsilon {self.epsilon:g}"
        return f"{self.name}, {self.settings.pairing}{epsilon}"


@dataclass(frozen=True)
class Comparison:
    """Result of the comparison for one source.

    Attributes:
        source: name of the source.
        shards: those that were read.
        num_shards: number of shards of the run.
        num_positions: number of positions in those shards whose next token is trained on.
        variants: compared variants, without the two models themselves.
        completed: the completed NLL by label; ``TARGET_ROW`` and ``SOURCE_ROW`` are the models themselves, over their full
            vocabularies.
        floored: the floored NLL of the same positions; the models themselves are their own windows.
    """

    source: str
    shards: tuple[int, ...]
    num_shards: int
    num_positions: int
    variants: tuple[AlignmentVariant, ...]
    completed: SharedNll
    floored: SharedNll


def alignment_variants(config: AlignConfig, *, epsilons: Sequence[float] = ()) -> tuple[AlignmentVariant, ...]:
    """List the variants: each method with both pairings, and the configured settings if no row has them.

    All take inexact pairs as they are (what is judged is what each pairing gives, on positions that all have), keep their
    tails, and see the configuration's window. One row more conditions the source at the positions inside its tokens
    (``inexact = "condition"``): the same rows elsewhere, so it differs in what it covers.

    Args:
        config: the configuration's own settings.
        epsilons: further ones for the two presets.

    Raises:
        ValueError: an epsilon is not above 0.
    """
    wrong = [epsilon for epsilon in epsilons if not 0 < epsilon < math.inf]
    if wrong:
        raise ValueError(f"--epsilon {wrong[0]}: expected a number above 0")
    alike = {"inexact": "transport", "tail": "bucket"}
    window = {"top_k": config.top_k, "top_p": config.top_p}
    kinds: list[tuple[str, dict[str, Any]]] = [(name, {"method": name}) for name in ("exact", "min-edit")]
    for preset, filled in PRESETS.items():
        kinds += [
            (preset, {"preset": preset, "epsilon": epsilon}) for epsilon in sorted({filled["epsilon"], *epsilons})
        ]
    conditions = {**alike, "inexact": "condition"}
    configured = config.model_copy(update=conditions if config.inexact == "condition" else alike)
    variants = []
    for name, chosen in kinds:
        for pairing in PAIRINGS:
            settings = AlignConfig.model_validate({**chosen, **alike, **window, "pairing": pairing})
            variants.append(
                AlignmentVariant(name, settings, settings.result_settings() == configured.result_settings())
            )
    settings = AlignConfig.model_validate({"preset": "semi-relaxed", **conditions, **window})
    variants.append(AlignmentVariant(CONDITIONED, settings, settings.result_settings() == configured.result_settings()))
    if not any(variant.is_configured for variant in variants):
        variants.append(AlignmentVariant("as configured", configured, is_configured=True))
    return tuple(variants)


def compare(
    request: Request,
    run_url: str,
    *,
    source: str | None = None,
    num_shards: int | None = None,
    epsilons: Sequence[float] = (),
) -> tuple[RunConfig, list[Comparison]]:
    """Compare the ways of aligning each source of a run with its target.

    Args:
        request: the configuration whose logits are read.
        run_url: the run directory.
        source: one of the sources; all of them by default.
        num_shards: number of shards to read, evenly spread; by default as many as ``SAMPLE_TOKENS`` need.
        epsilons: further ones for the two presets.

    Returns:
        The configuration, and a comparison for each source.

    Raises:
        StageError: logits are incomplete; says which command is next.
        ValueError: the source is unknown, or an epsilon is not above 0.
    """
    config = load_config(request.config_path, request.overrides)
    names = [model.name for model in config.sources]
    if source is not None and source not in names:
        raise ValueError(f"--source {source}: this configuration's sources are {', '.join(names)}")
    variants = alignment_variants(config.align, epsilons=epsilons)
    store = Store(run_url)
    run = Run(resolve(config, store, request), store, Console(stderr=True), local=True)
    chosen = [model for model in config.sources if source in (None, model.name)]
    target_key = f"logits/{config.target.name}"
    comparisons = []
    for model in chosen:
        total = require_complete(run, [target_key, f"logits/{model.name}"], "compare")
        shards = _sample(run, target_key, total, num_shards)
        log.info("%s: %d ways of aligning on %d of %d shards", model.name, len(variants), len(shards), total)
        comparisons.append(_compare_source(run, model, variants, shards, total))
    return config, comparisons


def _sample(run: Run, key: str, total: int, wanted: int | None) -> tuple[int, ...]:
    """Choose evenly spread shards."""
    if wanted is None:
        manifests = run.store.manifests(run.resolved.steps[key].folder)
        tokens = sum(manifest.num_tokens for manifest in manifests.values())
        wanted = total if tokens <= SAMPLE_TOKENS else max(1, total * SAMPLE_TOKENS // tokens)
    return evenly_spread(total, wanted)


def _compare_source(
    run: Run, source: ModelConfig, variants: tuple[AlignmentVariant, ...], shards: tuple[int, ...], total: int
) -> Comparison:
    stages = _set_up(run, source, variants)
    labels = (TARGET_ROW, SOURCE_ROW, *stages)
    completed: dict[str, list[np.ndarray]] = {label: [] for label in labels}
    floored: dict[str, list[np.ndarray]] = {label: [] for label in labels}
    documents: list[np.ndarray] = []
    partner_label = next(
        variant.label
        for variant in variants
        if variant.name == "semi-relaxed" and variant.settings.pairing == "boundary"
    )
    step = run.resolved.steps[f"align/{source.name}"]
    for shard in shards:
        # Draws are noise in a measure of single tokens, so variants are compared by their rows for the exact entries.
        inputs = {
            name: without_draws(table) for name, table in read_inputs(run.resolved, run.store, step, shard).items()
        }
        rows = _ShardNll(inputs["target"], inputs["source"], run.config.align)
        documents.append(rows.documents())
        nll_by_label = {TARGET_ROW: rows.target_nll()}
        for label, stage in stages.items():
            aligned = stage.run(inputs).table
            nll_by_label[label] = rows.aligned_nll(aligned)
            if label == partner_label:
                nll_by_label[SOURCE_ROW] = rows.source_nll(aligned)
        for label in labels:
            completed[label].append(nll_by_label[label].completed)
            floored[label].append(nll_by_label[label].floored)
    place = np.concatenate(documents)

    def compared(nll: dict[str, list[np.ndarray]]) -> SharedNll:
        joined = {label: np.concatenate(per_shard) for label, per_shard in nll.items()}
        return compare_shared(joined, documents=place, baseline=TARGET_ROW)

    return Comparison(source.name, shards, total, len(place), variants, compared(completed), compared(floored))


def _set_up(run: Run, source: ModelConfig, variants: tuple[AlignmentVariant, ...]) -> dict[str, AlignStage]:
    """Set up a stage for each variant."""
    tables = TokenTables(run.store, may_write=False)
    stages: dict[str, AlignStage] = {}
    for variant in variants:
        stage = AlignStage(variant.settings, run.config.target, source, tables)
        stage.setup()
        stages[variant.label] = stage
    return stages


class _PositionNll(NamedTuple):
    """Completed and floored NLL at P positions; NaN where there is no distribution."""

    completed: np.ndarray
    floored: np.ndarray


class _ShardNll:
    """A shard's logits, and the NLL of distributions at its positions, target row by target row.

    The positions are those whose next token is trained on: in plain text, all but the last.
    """

    def __init__(self, target: pa.Table, source: pa.Table, config: AlignConfig) -> None:
        self._target, self._source, self._config = target, source, config
        self._rows = rows_by_segment(target)
        self._source_rows = rows_by_segment(source)

    def documents(self) -> np.ndarray:
        """Return the document of each position."""
        lengths = [len(self._positions(row)) for row in self._rows.values()]
        return np.repeat([key[0] for key in self._rows], lengths)

    def _positions(self, row: int) -> np.ndarray:
        """Return the positions of a target row whose next token is trained on, in ascending order."""
        if not has_roles(self._target):
            return np.arange(max(len(list_row(self._target, "token_ids", row)) - 1, 0))
        return np.flatnonzero(list_row(self._target, "is_trained", row)[1:])

    def target_nll(self) -> _PositionNll:
        """Compute the NLL of the target itself."""
        return _joined([self._model_nll(self._target, row, self._positions(row)) for row in self._rows.values()])

    def aligned_nll(self, aligned: pa.Table) -> _PositionNll:
        """Compute the NLL of aligned distributions; NaN where the row was quarantined."""
        rows = rows_by_segment(aligned)
        segments = []
        for key, row in self._rows.items():
            here = self._positions(row)
            if key not in rows:
                segments.append(_nothing(len(here)))
                continue
            aligned_rows, target_rows = sparse_row(aligned, rows[key]), sparse_row(self._target, row)
            ids, probs = aligned_rows.ids[here], np.exp(aligned_rows.logprobs[here].astype(np.float64))
            gold = list_row(self._target, "token_ids", row).astype(np.int64)[here + 1]
            completed = completed_nll(
                ids,
                probs,
                list_row(aligned, "tail_mass", rows[key])[here].astype(np.float64),
                gold,
                own_ids=target_rows.ids[here],
                own_probs=np.exp(target_rows.logprobs[here].astype(np.float64)),
                own_gold_logprob=list_row(self._target, "gold_logprob", row)[here],
            )
            segments.append(_PositionNll(completed, floored_nll(ids, probs, gold)))
        return _joined(segments)

    def source_nll(self, aligned: pa.Table) -> _PositionNll:
        """Compute the NLL of the source for its own next token, at the positions whose distribution was taken."""
        rows = rows_by_segment(aligned)
        segments = []
        for key, row in self._rows.items():
            here = self._positions(row)
            segment_nll = _nothing(len(here))
            if key in rows and key in self._source_rows:
                taken = list_row(aligned, "source_position", rows[key])[here]
                source_row = self._source_rows[key]
                has_next = (taken >= 0) & (taken < len(list_row(self._source, "token_ids", source_row)) - 1)
                completed, floored = self._model_nll(self._source, source_row, taken[has_next])
                segment_nll.completed[has_next], segment_nll.floored[has_next] = completed, floored
            segments.append(segment_nll)
        return _joined(segments)

    def _model_nll(self, table: pa.Table, row: int, positions: np.ndarray) -> _PositionNll:
        """Compute the NLL of a model's own distributions for its own next tokens."""
        token_ids = list_row(table, "token_ids", row).astype(np.int64)
        window = sparse_row(table, row)
        floored = top_k_nll(
            window.ids[positions],
            np.exp(window.logprobs[positions].astype(np.float64)),
            token_ids[positions + 1],
            top_k=self._config.top_k,
            top_p=self._config.top_p,
        )
        return _PositionNll(exact_nll(list_row(table, "gold_logprob", row), positions), floored)


def _nothing(num_positions: int) -> _PositionNll:
    return _PositionNll(np.full(num_positions, np.nan), np.full(num_positions, np.nan))


def _joined(segments: list[_PositionNll]) -> _PositionNll:
    segments = segments or [_nothing(0)]
    return _PositionNll(*(np.concatenate(columns) for columns in zip(*segments, strict=True)))
