"""Fit stage: weights with which fuse mixes the candidates, from the logits and the aligned rows."""

import json
import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa

from pipeline.engine.progress import StepProgress
from pipeline.engine.worker import ShardStatus
from pipeline.run.session import Run, StageError, read_inputs, require_complete
from pipeline.run.shard_plan import evenly_spread
from pipeline.run.steps import Step, result_key
from stages.fuse.fit import fit_weights, mixture_nll, shrunk
from stages.models.token_tables import TokenTables

MAX_POSITIONS: Final = 4_000_000
"""Number of positions that weights are fitted on, evenly spread: their standard error is then below 0.001."""


def run_fit(run: Run) -> None:
    """Fit the weights of ``fuse.function = "fitted"``, for the whole text and, with ``fuse.per``, for each kind.

    Raises:
        StageError: logits or align is incomplete, or no position has a distribution of every candidate.
    """
    steps = run.resolved.of_stage("fit")
    if not steps:
        run.console.print(f"fit: nothing to do (fuse.function = {run.config.fuse.function!r} needs no weights)")
        return
    (step,) = steps
    num_shards = require_complete(run, list(step.inputs.values()), "fit")
    if run.store.exists(result_key(step)):
        run.console.print("fit: nothing to do (the weights exist)")
        return
    started = time.monotonic()
    names = [model.name for model in run.config.models]
    shards = evenly_spread(num_shards, run.config.fuse.fit_shards)
    nll, kinds = _gold_nll(run, step, shards)
    if not len(nll):
        raise StageError(
            f"fit: none of the positions of {len(shards)} shards has a distribution of each of {', '.join(names)}, so "
            "there are no positions to fit weights on: see `covered` in `ptafuse status`, or set fuse.function = "
            "'min-ce'"
        )
    rows = fitted_rows(nll, kinds)
    value = {
        "candidates": names,
        "rows": rows,
        "shards": list(shards),
        "num_shards": num_shards,
        "num_tokens": len(nll),
        "seconds": round(time.monotonic() - started, 1),
        "settings": dict(step.settings),
    }
    run.store.create(result_key(step), (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())
    shown = ", ".join(f"{name} {weight:.3f}" for name, weight in zip(names, rows[0]["weights"], strict=True))
    kinds_shown = f", and for {len(rows) - 1} kinds" if len(rows) > 1 else ""
    run.console.print(f"fit: {shown} on {len(nll):,} positions{kinds_shown}", soft_wrap=True)


def fitted_rows(nll: np.ndarray, kinds: np.ndarray) -> list[dict[str, Any]]:
    """Fit weights on all positions, and on those of each kind.

    Args:
        nll: (T, C) nats of the gold tokens, see ``FuseStage.gold_nll``.
        kinds: (T,) the kind of each position's document; "" where it has none, or weights are not fitted by kind.

    Returns:
        One row for the whole text, whose ``kind`` is None, and one for each kind: its number of positions, the weights, and
        mean nats under the mixture (whose weights of a kind are drawn to those of the whole text) and each candidate.
    """
    whole = fit_weights(nll)
    rows = [_row(None, nll, whole)]
    for kind in np.unique(kinds[kinds != ""]).tolist():
        kind_nll = nll[kinds == kind]
        rows.append(_row(kind, kind_nll, shrunk(fit_weights(kind_nll), len(kind_nll), whole)))
    return rows


def _row(kind: str | None, nll: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    return {
        "kind": kind,
        "num_positions": len(nll),
        "weights": weights.tolist(),
        "nll": float(mixture_nll(nll, weights).mean()),
        "candidate_nll": nll.mean(axis=0, dtype=np.float64).tolist(),
    }


def _gold_nll(run: Run, step: Step, shards: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return what the candidates give the gold tokens, (T, C) nats, and the kind of each position's document."""
    # Loads compilers and tokenizers, which a finished run does not need.
    from stages.fuse.stage import FuseStage

    config = run.config
    stage = FuseStage(config.fuse, config.target, config.sources, TokenTables(run.store))
    stage.setup()
    nll: list[np.ndarray] = []
    kinds: list[np.ndarray] = []
    with StepProgress(run.console, step.key, len(shards), 0) as progress:
        for shard in shards:
            inputs = read_inputs(run.resolved, run.store, step, shard)
            gold = stage.gold_nll(inputs)
            stride = max(1, -(-len(gold.nll) * len(shards) // MAX_POSITIONS))
            nll.append(gold.nll[::stride])
            kinds.append(_kinds_of(gold.doc_ids[::stride], inputs.get("kinds")))
            progress.add(ShardStatus(shard, "done", num_tokens=len(gold.nll)))
    return np.concatenate(nll), np.concatenate(kinds)


def _kinds_of(doc_ids: np.ndarray, kinds: pa.Table | None) -> np.ndarray:
    """Return the kind of each position's document, (T,); "" without a kind."""
    kind_of = {} if kinds is None else dict(zip(kinds["doc_id"].to_pylist(), kinds["kind"].to_pylist(), strict=True))
    documents, place = np.unique(doc_ids, return_inverse=True)
    return np.array([kind_of.get(doc_id) or "" for doc_id in documents.tolist()], object)[place]
