"""``ptafuse interpret``: computes the figures of a configuration once, shard by shard, and keeps them in the run directory.

Transport plans and losing candidates are not stored, so both are computed again, by the stages themselves, on
a sample. Each shard's result is kept until all are done: a killed command resumes with the next shard.
"""

import json
import logging
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.analysis.interpret.figures import DocumentFigures, distance_rows, win_rows
from pipeline.analysis.interpret.pairs import most_moved, summarize_pairs
from pipeline.analysis.interpret.sample import choose_rows, choose_shards, length_kind
from pipeline.dataset.documents import read_kinds
from pipeline.display.text import printable
from pipeline.run.session import Run, StageError, command, read_inputs, require_complete
from pipeline.run.shard_plan import read_plan
from pipeline.run.steps import ResolvedRun
from pipeline.settings.interpret import VERSION
from stages.align.stage import AlignStage
from stages.contract.columns import list_row, segment_keys
from stages.contract.fingerprint import fingerprint
from stages.contract.roles import has_roles
from stages.contract.store import Store
from stages.fuse.stage import FuseStage
from stages.models.embeddings import load_input_embeddings
from stages.models.token_space import TokenSpace
from stages.models.token_tables import TokenTables

FUSED: Final = "fused"
MAX_KIND_LENGTH: Final = 40
"""Characters of a document's kind; a column of longer texts hardly holds kinds."""

log = logging.getLogger(__name__)


def folder_of(run: ResolvedRun) -> str:
    """Return the folder of a configuration's figures in the run directory."""
    fuse = run.config.fuse
    settings = {
        "interpret": run.config.interpret.result_settings(),
        "kind_column": run.config.dataset.kind_column,
        "judged": [fuse.granularity, fuse.unit],  # also where fuse itself does not read them
    }
    return f"interpret/{fingerprint('interpret', VERSION, settings, {'fuse': run.steps['fuse'].fingerprint})}"


def read_interpretation(run: ResolvedRun, store: Store) -> dict[str, Any] | None:
    """Read the figures of a configuration; None if they were not computed."""
    try:
        return json.loads(store.read(_result_key(run)))
    except FileNotFoundError:
        return None


def interpret(run: Run) -> dict[str, Any]:
    """Compute the figures of a configuration, or read them where that was done.

    Returns:
        JSON values; docs/interpretability.md says what each is.

    Raises:
        StageError: logits, align or fuse are incomplete, or the sample has no fused position.
        DatasetError: ``dataset.kind_column`` cannot be read.
    """
    recorded = read_interpretation(run.resolved, run.store)
    if recorded is not None:
        run.console.print(f"interpret: nothing to do ({_result_key(run.resolved)} exists)", soft_wrap=True)
        return recorded
    steps = [step.key for step in run.resolved.fused_steps]
    num_shards = require_complete(run, steps, "interpret")
    settings = run.config.interpret
    shards = choose_shards(num_shards, max_shards=settings.max_shards, seed=settings.seed)
    interpreter = _Interpreter(run, -(-settings.max_positions // len(shards)))
    shard_results = []
    for number, shard in enumerate(shards, start=1):
        shard_results.append(_shard_result(run, interpreter, shard))
        run.console.print(f"interpret: shard {shard} ({number} of {len(shards)})", soft_wrap=True)
    result = _result(run, shard_results, shards, num_shards)
    run.store.create(_result_key(run.resolved), (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    for shard in shards:
        run.store.delete(_shard_result_key(run.resolved, shard))
    return result


def _shard_result(run: Run, interpreter: "_Interpreter", shard: int) -> dict[str, Any]:
    """Return one shard's figures, and read them if an earlier command computed them."""
    key = _shard_result_key(run.resolved, shard)
    try:
        raw = run.store.read(key)
    except FileNotFoundError:
        raw = json.dumps(interpreter.interpret_shard(shard), allow_nan=False).encode()
        run.store.create(key, raw)
    return json.loads(raw)


class _Interpreter:
    """Interpreter of shards that loads tokenizers, kernels and embeddings when the first shard is computed.

    Args:
        run: the run.
        max_positions: approximate number of positions read in each shard.
    """

    def __init__(self, run: Run, max_positions: int) -> None:
        self._run = run
        self._max_positions = max_positions
        self._stages: tuple[FuseStage, dict[str, AlignStage], TokenSpace] | None = None

    def interpret_shard(self, shard: int) -> dict[str, Any]:
        """Compute the figures of a shard's documents, and the pairs of tokens of each source."""
        fuse, aligns, space = self._loaded()
        run, target_name = self._run, self._run.config.target.name
        inputs = read_inputs(run.resolved, run.store, run.resolved.steps["fuse"], shard)
        target = inputs[f"logits/{target_name}"]
        doc_ids = target["doc_id"].to_numpy()
        rows = choose_rows(
            doc_ids, _num_positions(target), max_positions=self._max_positions, seed=run.config.interpret.seed
        )
        figures: dict[int, DocumentFigures] = {}
        for row, segment in zip(rows, fuse.fused_segments(inputs, rows), strict=True):
            doc_id, segment_figures = int(doc_ids[row]), DocumentFigures.of_segment(segment, space)
            figures[doc_id] = figures[doc_id] + segment_figures if doc_id in figures else segment_figures
        kinds = self._kinds(shard, target, rows)
        pairs = {}
        for name, stage in aligns.items():
            tables = {"target": target, "source": inputs[f"logits/{name}"]}
            pairs[name] = summarize_pairs(stage.pair_mass(tables, _aligned_rows(target, inputs[f"align/{name}"], rows)))
        return {
            "documents": [
                {"doc_id": doc_id, "kind": kinds[doc_id], **segment_figures.to_json()}
                for doc_id, segment_figures in figures.items()
            ],
            "pairs": pairs,
        }

    def _loaded(self) -> tuple[FuseStage, dict[str, AlignStage], TokenSpace]:
        if self._stages is None:
            config = self._run.config
            tables = TokenTables(self._run.store)
            fuse = FuseStage(config.fuse, config.target, config.sources, tables)
            aligns = {model.name: AlignStage(config.align, config.target, model, tables) for model in config.sources}
            fuse.setup()
            for stage in aligns.values():
                stage.setup()
            vocabulary = tables.read(config.target).vocabulary
            self._stages = fuse, aligns, TokenSpace(load_input_embeddings(config.target), vocabulary)
        return self._stages

    def _kinds(self, shard: int, target: pa.Table, rows: list[int]) -> dict[int, str]:
        """Return the kind of each document: from the dataset if it has kinds, else by its length."""
        run = self._run
        doc_ids = target["doc_id"].to_numpy()
        if run.config.dataset.kind_column is None:
            num_bytes: dict[int, int] = {}
            for row in rows:
                last = list_row(target, "byte_end", row)[-1:]
                num_bytes[int(doc_ids[row])] = num_bytes.get(int(doc_ids[row]), 0) + int(last.sum())
            return {doc_id: length_kind(size) for doc_id, size in num_bytes.items()}
        plan = read_plan(run.store, run.resolved.steps["shard"].folder)
        assert plan is not None  # the shard is fused
        kind_of = read_kinds(run.config.dataset, plan.ranges[shard])
        chosen = {int(doc_ids[row]): kind_of[int(doc_ids[row])] for row in rows}
        missing = sum(kind is None for kind in chosen.values())
        if missing:
            log.warning(
                "shard %d: %d of %d documents have no kind in the column %r",
                shard,
                missing,
                len(chosen),
                run.config.dataset.kind_column,
            )
        return {doc_id: "(none)" if kind is None else _shortened(kind) for doc_id, kind in chosen.items()}


def _num_positions(target: pa.Table) -> np.ndarray:
    """Count the positions of each row whose next token is trained on, (R,)."""
    if has_roles(target):
        return np.array([list_row(target, "is_trained", row)[1:].sum() for row in range(target.num_rows)], np.int64)
    return np.maximum(pc.list_value_length(target["token_ids"]).to_numpy() - 1, 0)


def _shortened(kind: str) -> str:
    shown = printable(kind)
    return shown if len(shown) <= MAX_KIND_LENGTH else shown[: MAX_KIND_LENGTH - 1] + "…"


def _aligned_rows(target: pa.Table, aligned: pa.Table, rows: list[int]) -> list[int]:
    """Return the target's rows that are aligned, that is, not in align's quarantine."""
    done = set(segment_keys(aligned))
    keys = segment_keys(target)
    return [row for row in rows if keys[row] in done]


def _result(run: Run, shard_results: list[dict[str, Any]], shards: list[int], num_shards: int) -> dict[str, Any]:
    config = run.config
    records = [record for shard in shard_results for record in shard["documents"]]
    documents = [DocumentFigures.from_json(record) for record in records]
    if not any(document.num_fused for document in documents):
        raise StageError(
            f"interpret: none of the {sum(document.num_positions for document in documents):,} positions in {len(shards)} of "
            f"{num_shards} shards has a fused distribution: look at the health of {command(run, 'fuse')}, or read more with "
            "--set interpret.max_shards"
        )
    candidates = [model.name for model in config.models]
    tables = TokenTables(run.store)
    vocabularies = {model.name: tables.read(model).vocabulary for model in config.models}
    target_vocabulary = vocabularies[config.target.name]
    return {
        "target": config.target.name,
        "sources": [model.name for model in config.sources],
        "function": config.fuse.function,
        "granularity": config.fuse.granularity,
        "unit": config.fuse.unit,
        "kind_column": config.dataset.kind_column,
        "settings": config.interpret.result_settings(),
        "version": VERSION,
        "fuse": run.resolved.steps["fuse"].fingerprint,
        "shards": shards,
        "num_shards": num_shards,
        "num_documents": len(documents),
        "num_positions": sum(document.num_positions for document in documents),
        "distances": distance_rows(documents, [*candidates, FUSED]),
        "wins": win_rows(documents, [record["kind"] for record in records], candidates),
        "pairs": [
            {
                "source": model.name,
                **most_moved(
                    [shard["pairs"][model.name] for shard in shard_results],
                    vocabularies[model.name],
                    target_vocabulary,
                    num_pairs=config.interpret.num_pairs,
                ),
            }
            for model in config.sources
        ],
    }


def _result_key(run: ResolvedRun) -> str:
    return f"{folder_of(run)}/figures.json"


def _shard_result_key(run: ResolvedRun, shard: int) -> str:
    return f"{folder_of(run)}/parts/shard-{shard:05d}.json"
