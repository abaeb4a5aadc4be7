"""Configurations with figures that were made up: what reports do with results, without computing any."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.run.records import record
from pipeline.run.resolve import resolve
from pipeline.run.stage_table import FUSED
from pipeline.run.steps import Request, ResolvedRun, result_key
from pipeline.settings.load import load_config
from stages.contract.store import Store


def evaluation(figures: Sequence[float], sizes: Sequence[int]) -> dict:
    """Return an evaluation of documents 0, 1, ... with these figures and bytes."""
    return evaluation_of(dict(enumerate(figures)), sizes)


def evaluation_of(documents: Mapping[int, float], sizes: Sequence[int] | None = None) -> dict:
    """Return an evaluation of these documents: doc_id -> bits per byte."""
    sizes = sizes or [100] * len(documents)
    total = sum(figure * size for figure, size in zip(documents.values(), sizes, strict=True))
    return {
        "bits_per_byte": total / sum(sizes) if documents else 0.0,
        "num_bytes": sum(sizes),
        "documents": [
            {"doc_id": number, "bits_per_byte": figure, "num_bytes": size}
            for (number, figure), size in zip(documents.items(), sizes, strict=True)
        ],
    }


def begin(store: Store, config: Path, *overrides: str) -> ResolvedRun:
    """Record a configuration, as every command does that computes something."""
    request = Request(str(config), overrides)
    run = resolve(load_config(config, overrides), store, request)
    record(run, store)
    return run


def put(store: Store, run: ResolvedRun, model: str, figures: Mapping) -> None:
    """Put the figures of one evaluated model where a run looks for them."""
    step = run.steps[f"eval/{model}"]
    store.replace(result_key(step), json.dumps({**figures, "settings": dict(step.settings)}).encode())


def finish(store: Store, config: Path, *overrides: str, figure: float = 1.0) -> ResolvedRun:
    """Record a configuration whose trained model has a figure."""
    run = begin(store, config, *overrides)
    put(store, run, FUSED, evaluation([figure, figure], [100, 100]))
    return run
