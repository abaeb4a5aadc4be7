"""Data of the document viewer: every position of a few documents, explained by the stages themselves.

Everything is written as small JSON: texts by index into one table, probabilities as integers in units of 1e-4, lists of
(text, probability) flattened. ``page.js`` reads it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from pipeline.analysis.turns import SegmentTurns, segment_turns
from pipeline.run.session import read_inputs
from pipeline.run.shard_plan import read_plan
from pipeline.run.steps import ResolvedRun, Step
from stages.align.explain import AlignmentExplanation, token_text
from stages.align.stage import AlignStage
from stages.contract.columns import list_row
from stages.contract.store import Store
from stages.fuse.explanation import FusionExplanation
from stages.fuse.stage import FuseStage
from stages.models.token_tables import TokenTables

UNIT: Final = 10_000
"""A probability of 1 in the JSON; what is smaller than half a unit shows as 0."""


class TextTable:
    """Texts by index, each stored once."""

    def __init__(self) -> None:
        self._index: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        """Return the text's index; bytes that are not UTF-8 (surrogate escapes) are written in hexadecimal."""
        shown = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return self._index.setdefault(shown, len(self._index))

    @property
    def texts(self) -> list[str]:
        """Texts in the order of their indices."""
        return list(self._index)


@dataclass(frozen=True)
class _Segment:
    """A segment to show: its row in the target's logits of a shard."""

    shard: int
    row: int
    doc_id: int
    number: int
    num_tokens: int


def viewer_data(runs: Sequence[ResolvedRun], store: Store, *, max_positions: int) -> dict[str, Any]:
    """Collect the viewer's data: the same documents for every configuration, and one shared table of texts.

    Args:
        runs: recorded configurations; those that share their fused distributions are shown once.
        store: the run directory.
        max_positions: target positions in all; documents from evenly spread shards are taken until they would exceed it.

    Returns:
        ``{"texts": [...], "views": [{"name", "target", "sources", "documents"}]}``; see ``page.js``.
    """
    texts = TextTable()
    distinct = {run.steps["fuse"].folder: run for run in reversed(runs)}.values()
    ready = [(run, shards) for run in distinct if (shards := _finished_shards(run, store))]
    views = [
        {
            "name": run.label,
            "target": run.config.target.name,
            "sources": [model.name for model in run.config.sources],
            "documents": _documents(run, store, _choose(run, store, shards, max_positions // len(ready)), texts),
        }
        for run, shards in ready
    ]
    return {"unit": UNIT, "texts": texts.texts, "views": views}


def _finished_shards(run: ResolvedRun, store: Store) -> list[int]:
    """Return the shards whose fused distributions and all their inputs are done."""
    plan = read_plan(store, run.steps["shard"].folder)
    if plan is None:
        return []
    done = [set(store.manifest_names(step.folder)) for step in run.fused_steps]
    names = set.intersection(*done)
    return sorted(int(name.removeprefix("shard-").removesuffix(".json")) for name in names)


def _choose(run: ResolvedRun, store: Store, shards: Sequence[int], max_positions: int) -> list[list[_Segment]]:
    """Choose whole documents: the first of every shard, then the second of every shard, while they fit.

    The first document is always chosen.
    """
    pending = [_segments_by_document(run, store, shard) for shard in _spread(shards)]
    chosen: list[list[_Segment]] = []
    left = max_positions
    for rank in range(max(map(len, pending))):
        for documents in pending:
            size = sum(segment.num_tokens for segment in documents[rank]) if rank < len(documents) else 0
            if size and (size <= left or not chosen):
                chosen.append(documents[rank])
                left -= size
    return sorted(chosen, key=lambda segments: (segments[0].shard, segments[0].row))


def _documents(
    run: ResolvedRun, store: Store, chosen: Sequence[Sequence[_Segment]], texts: TextTable
) -> list[dict[str, Any]]:
    target = run.config.target
    tables = TokenTables(store, may_write=False)
    fuse = FuseStage(run.config.fuse, target, run.config.sources, tables)
    fuse.setup()
    aligns = {model.name: AlignStage(run.config.align, target, model, tables) for model in run.config.sources}
    for stage in aligns.values():
        stage.setup()
    vocabulary = tables.read(target).vocabulary
    documents = []
    shard, inputs, messages = -1, {}, None
    for segments in chosen:
        if segments[0].shard != shard:
            shard = segments[0].shard
            inputs = read_inputs(run, store, run.steps["fuse"], shard)
            messages = _table(store, run.steps["shard"], shard) if run.config.dataset.has_conversations else None
        target_logits = inputs[f"logits/{target.name}"]
        segment_entries = []
        for segment in segments:
            candidates = [
                stage.explain_row({"target": target_logits, "source": inputs[f"logits/{name}"]}, segment.row)
                for name, stage in aligns.items()
            ]
            positions = zip(fuse.explain_row(inputs, segment.row), *candidates, strict=True)
            token_ids = list_row(target_logits, "token_ids", segment.row).tolist()
            segment_entries.append(
                {
                    "segment": segment.number,
                    "tokens": [texts(token_text(vocabulary, token_id)) for token_id in token_ids],
                    "positions": [_position(fusion, sources, texts) for fusion, *sources in positions],
                    **({} if messages is None else _turns(segment_turns(messages, target_logits, segment.row))),
                }
            )
        documents.append({"doc": segments[0].doc_id, "shard": shard, "segments": segment_entries})
    return documents


def _turns(segment_turns: SegmentTurns | None) -> dict[str, Any]:
    """Encode the messages of a segment (role, number of tokens, whether it is trained on) and the template's tokens."""
    if segment_turns is None:
        return {}
    return {
        "turns": [[turn.role, turn.end - turn.start, int(turn.is_trained)] for turn in segment_turns.turns],
        "bare": np.flatnonzero(segment_turns.is_template).tolist(),
    }


MAX_SHARDS: Final = 8
"""Shards from which documents are shown."""


def _spread(shards: Sequence[int]) -> list[int]:
    """Return at most ``MAX_SHARDS`` shards, evenly spaced."""
    picks = np.linspace(0, len(shards) - 1, min(len(shards), MAX_SHARDS)).round().astype(int)
    return [shards[index] for index in dict.fromkeys(picks.tolist())]


def _segments_by_document(run: ResolvedRun, store: Store, shard: int) -> list[list[_Segment]]:
    table = _table(store, run.steps[f"logits/{run.config.target.name}"], shard)
    segments: dict[int, list[_Segment]] = {}
    columns = (table["doc_id"].to_pylist(), table["segment"].to_pylist(), table["token_ids"])
    for row, (doc_id, number, tokens) in enumerate(zip(*columns, strict=True)):
        segments.setdefault(doc_id, []).append(_Segment(shard, row, doc_id, number, len(tokens)))
    return list(segments.values())


def _table(store: Store, step: Step, shard: int) -> pa.Table:
    manifest = store.read_manifest(step.folder, shard)
    assert manifest is not None  # _finished_shards saw it
    return store.read_table(manifest.data, remake=f"`make {step.stage}`")


def _position(fusion: FusionExplanation, sources: Sequence[AlignmentExplanation], texts: TextTable) -> dict[str, Any]:
    """Encode one position; empty parts are left out."""
    target = sources[0].target_topk if sources else ()
    return {
        "g": -1 if fusion.gold is None else texts(fusion.gold),
        **({} if fusion.is_learnt or fusion.gold is None else {"x": 1}),
        "t": _flat(((token.text, token.prob) for token in target), texts),
        "w": -1 if fusion.chosen is None else [candidate.name for candidate in fusion.candidates].index(fusion.chosen),
        "c": [[_rounded(candidate.cross_entropy), round(candidate.weight, 4)] for candidate in fusion.candidates],
        "f": _flat(fusion.fused, texts),
        "z": _units(fusion.tail_mass),
        "s": [_source(source, texts) for source in sources],
    }


def _source(source: AlignmentExplanation, texts: TextTable) -> dict[str, Any]:
    here = next(token for token in source.context if token.position == source.position)
    encoded: dict[str, Any] = {
        "o": source.outcome,
        "e": int(source.exact_context),
        "p": [here.source_start, [texts(text) for text in here.source_texts]],
        "k": _flat(((entry.text, entry.prob) for entry in source.source_topk), texts),
        "r": _flat(((entry.text, entry.prob) for entry in source.projected), texts),
        "z": _units(source.tail_mass),
    }
    if source.seen:
        encoded["n"] = texts(source.seen)
    if source.plan.size:
        encoded["u"] = [texts(entry.text) for entry in source.support]
        encoded["m"] = [[_units(mass) for mass in row] for row in source.plan.tolist()]
    return encoded


def _flat(entries: Iterable[tuple[str, float]], texts: TextTable) -> list[int]:
    return [number for text, prob in entries for number in (texts(text), _units(prob))]


def _units(prob: float) -> int:
    return round(prob * UNIT)


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)
