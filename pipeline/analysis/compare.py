"""``ptafuse compare``: the teacher NLL of every way of aligning on the same positions, from finished logits alone.

It says what an alignment is worth before anybody pays for training with it. Everything is computed in this process, on
a sample of the shards, and nothing is written.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
from rich.console import Console

from pipeline.run.resolve import resolve
from pipeline.run.session import Run, read_inputs, require_complete
from pipeline.run.steps import Request
from pipeline.settings.load import load_config
from pipeline.settings.run import RunConfig
from stages.align.config import PRESETS, AlignConfig
from stages.align.stage import AlignStage
from stages.align.teacher import SharedNll, compare_shared, distribution_nll, window_nll
from stages.contract.columns import list_row, rows_by_segment, sparse_row
from stages.contract.store import Store
from stages.models.config import ModelConfig

log = logging.getLogger(__name__)

Tail = Literal["bucket", "renormalise"]

SAMPLE_TOKENS: Final = 100_000
"""Target tokens that are compared where the command does not say how many shards: some 20 s of computing."""

PAIRINGS: Final = ("edit-distance", "boundary")
TARGET_ROW: Final = "target itself"
SOURCE_ROW: Final = "source itself"


@dataclass(frozen=True)
class Way:
    """One way of aligning: a row of the table.

    Attributes:
        name: a preset, a method, or ``"as configured"``.
        settings: all of it.
        is_configured: it is what the configuration says, but for ``inexact`` and ``tail``, which all rows share.
    """

    name: str
    settings: AlignConfig
    is_configured: bool = False

    @property
    def epsilon(self) -> float | None:
        """Epsilon, where the method reads it."""
        return self.settings.epsilon if self.settings.method == "transport" else None

    @property
    def label(self) -> str:
        """Unique among the rows."""
        epsilon = "" if self.epsilon is None else f", epsilon {self.epsilon:g}"
        return f"{self.name}, {self.settings.pairing}{epsilon}"


@dataclass(frozen=True)
class Comparison:
    """What was found for one source.

    Attributes:
        source: its name.
        shards: those that were read.
        num_shards: of the run.
        num_positions: with a next token, in those shards.
        ways: what was compared, but the two models themselves.
        found: by label; ``TARGET_ROW`` and ``SOURCE_ROW`` are the models themselves.
    """

    source: str
    shards: tuple[int, ...]
    num_shards: int
    num_positions: int
    ways: tuple[Way, ...]
    found: SharedNll


def ways_of(config: AlignConfig, *, tail: Tail, epsilons: Sequence[float] = ()) -> tuple[Way, ...]:
    """The rows: each method with both pairings, and the configuration's own settings where no row has them.

    All take inexact pairs as they are (what is judged is what each pairing gives, on positions that all have), treat the
    tail alike, and see the configuration's window.

    Args:
        config: the configuration's own settings.
        tail: of every row.
        epsilons: further ones for the two presets.

    Raises:
        ValueError: an epsilon is not above 0.
    """
    wrong = [epsilon for epsilon in epsilons if not 0 < epsilon < math.inf]
    if wrong:
        raise ValueError(f"--epsilon {wrong[0]}: expected a number above 0")
    alike = {"inexact": "transport", "tail": tail}
    window = {"top_k": config.top_k, "top_p": config.top_p}
    kinds: list[tuple[str, dict[str, Any]]] = [(name, {"method": name}) for name in ("exact", "min-edit")]
    for preset, filled in PRESETS.items():
        kinds += [
            (preset, {"preset": preset, "epsilon": epsilon}) for epsilon in sorted({filled["epsilon"], *epsilons})
        ]
    configured = config.model_copy(update=alike)
    ways = []
    for name, chosen in kinds:
        for pairing in PAIRINGS:
            settings = AlignConfig.model_validate({**chosen, **alike, **window, "pairing": pairing})
            ways.append(Way(name, settings, settings.result_settings() == configured.result_settings()))
    if not any(way.is_configured for way in ways):
        ways.append(Way("as configured", configured, is_configured=True))
    return tuple(ways)


def compare(
    request: Request,
    run_url: str,
    *,
    source: str | None = None,
    num_shards: int | None = None,
    epsilons: Sequence[float] = (),
    tail: Tail = "bucket",
) -> tuple[RunConfig, list[Comparison]]:
    """Compare the ways of aligning each source of a run with its target.

    Args:
        request: the configuration whose logits are read.
        run_url: the run directory.
        source: one of the sources; all of them by default.
        num_shards: how many shards are read, evenly spread; by default as many as hold ``SAMPLE_TOKENS``.
        epsilons: further ones for the two presets.
        tail: how every row treats what its window leaves out.

    Returns:
        The configuration, and a comparison for each source.

    Raises:
        StageError: logits are incomplete; says which command is next.
        ValueError: there is no such source, or an epsilon is not above 0.
    """
    config = load_config(request.config_path, request.overrides)
    names = [model.name for model in config.sources]
    if source is not None and source not in names:
        raise ValueError(f"--source {source}: this configuration's sources are {', '.join(names)}")
    ways = ways_of(config.align, tail=tail, epsilons=epsilons)
    store = Store(run_url)
    run = Run(resolve(config, store, request), store, Console(stderr=True), local=True)
    chosen = [model for model in config.sources if source in (None, model.name)]
    target_key = f"logits/{config.target.name}"
    found = []
    for model in chosen:
        total = require_complete(run, [target_key, f"logits/{model.name}"], "compare")
        shards = _sample(run, target_key, total, num_shards)
        log.info("%s: %d ways of aligning on %d of %d shards", model.name, len(ways), len(shards), total)
        found.append(_compare_source(run, model, ways, shards, total, tail))
    return config, found


def _sample(run: Run, key: str, total: int, wanted: int | None) -> tuple[int, ...]:
    """Evenly spread shards."""
    if wanted is None:
        manifests = run.store.manifests(run.resolved.steps[key].folder)
        tokens = sum(manifest.num_tokens for manifest in manifests.values())
        wanted = total if tokens <= SAMPLE_TOKENS else max(1, total * SAMPLE_TOKENS // tokens)
    count = min(wanted, total)
    return tuple(index * total // count for index in range(count))


def _compare_source(
    run: Run, source: ModelConfig, ways: tuple[Way, ...], shards: tuple[int, ...], total: int, tail: Tail
) -> Comparison:
    stages = _set_up(run.config.target, source, ways)
    nll: dict[str, list[np.ndarray]] = {label: [] for label in (TARGET_ROW, SOURCE_ROW, *stages)}
    documents: list[np.ndarray] = []
    partner_label = next(way.label for way in ways if way.name == "semi-relaxed" and way.settings.pairing == "boundary")
    step = run.resolved.steps[f"align/{source.name}"]
    for shard in shards:
        inputs = read_inputs(run.resolved, run.store, step, shard)
        rows = _Shard(inputs["target"], inputs["source"], run.config.align, tail)
        documents.append(rows.documents())
        nll[TARGET_ROW].append(rows.target_nll())
        for label, stage in stages.items():
            aligned = stage.run(inputs).table
            nll[label].append(rows.aligned_nll(aligned))
            if label == partner_label:
                nll[SOURCE_ROW].append(rows.source_nll(aligned))
    joined = {label: np.concatenate(parts) for label, parts in nll.items()}
    found = compare_shared(joined, documents=np.concatenate(documents), baseline=TARGET_ROW)
    return Comparison(source.name, shards, total, len(joined[TARGET_ROW]), ways, found)


def _set_up(target: ModelConfig, source: ModelConfig, ways: tuple[Way, ...]) -> dict[str, AlignStage]:
    """A stage for each way."""
    stages: dict[str, AlignStage] = {}
    for way in ways:
        stage = AlignStage(way.settings, target, source)
        stage.setup()
        stages[way.label] = stage
    return stages


class _Shard:
    """One shard's logits, and the NLL of distributions at its positions: target row by target row, all but the last."""

    def __init__(self, target: pa.Table, source: pa.Table, config: AlignConfig, tail: Tail) -> None:
        self._target, self._source, self._config, self._tail = target, source, config, tail
        self._keys = rows_by_segment(target)
        self._source_rows = rows_by_segment(source)
        self._token_ids = {key: list_row(target, "token_ids", row).astype(np.int64) for key, row in self._keys.items()}

    def documents(self) -> np.ndarray:
        """The document of each position."""
        return _joined([np.full(max(len(ids) - 1, 0), key[0]) for key, ids in self._token_ids.items()], np.int64)

    def target_nll(self) -> np.ndarray:
        """Of the target's own window."""
        return _joined(
            [self._window_nll(self._target, row, ids, np.arange(len(ids) - 1)) for row, ids in self._target_rows()]
        )

    def aligned_nll(self, aligned: pa.Table) -> np.ndarray:
        """Of aligned distributions; NaN where there is none, or the row was quarantined."""
        rows = rows_by_segment(aligned)
        parts = []
        for key, ids in self._token_ids.items():
            nll = np.full(max(len(ids) - 1, 0), np.nan)
            if key in rows:
                found = sparse_row(aligned, rows[key])
                nll = distribution_nll(found.ids[:-1], np.exp(found.logprobs[:-1].astype(np.float64)), ids[1:])
            parts.append(nll)
        return _joined(parts)

    def source_nll(self, aligned: pa.Table) -> np.ndarray:
        """Of the source's own window for its own next token, at the positions that were taken; NaN where none was."""
        rows = rows_by_segment(aligned)
        parts = []
        for key, ids in self._token_ids.items():
            nll = np.full(max(len(ids) - 1, 0), np.nan)
            if key in rows and key in self._source_rows:
                taken = list_row(aligned, "source_position", rows[key])[:-1]
                row = self._source_rows[key]
                own_ids = list_row(self._source, "token_ids", row).astype(np.int64)
                has_next = (taken >= 0) & (taken < len(own_ids) - 1)
                nll[has_next] = self._window_nll(self._source, row, own_ids, taken[has_next])
            parts.append(nll)
        return _joined(parts)

    def _target_rows(self) -> list[tuple[int, np.ndarray]]:
        return [(row, self._token_ids[key]) for key, row in self._keys.items()]

    def _window_nll(self, table: pa.Table, row: int, token_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        window = sparse_row(table, row)
        probs = np.exp(window.logprobs[positions].astype(np.float64))
        return window_nll(
            window.ids[positions],
            probs,
            token_ids[positions + 1],
            top_k=self._config.top_k,
            top_p=self._config.top_p,
            tail=self._tail,
        )


def _joined(parts: list[np.ndarray], dtype: type = np.float64) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype)
