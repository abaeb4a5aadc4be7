"""Bits per byte on held-out text, with paired differences: rows for the terminal and for the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.display.table import ResultTable
from pipeline.run.outcomes import read_result
from pipeline.run.stage_table import FUSED
from pipeline.run.steps import ResolvedRun, Step
from pipeline.settings.baselines import BASELINE_LABELS, ENSEMBLE, Baseline
from stages.contract.store import Store
from stages.measures.standard_error import Estimate, weighted_mean

_Result = dict[str, Any] | None
"""A model's figures, as ``read_result`` gives them."""


@dataclass(frozen=True)
class HeldOutRow:
    """One model on the held-out text.

    Attributes:
        label: which model.
        bits_per_byte: over all documents; None if it was not evaluated.
        num_bytes: of text.
        against_before: difference to the target before training; None for the target itself and for sources.
        against_gold_only: difference to training on the gold tokens alone; None without such a run, and for that run.
        refused: why there is no such model, of a baseline that these models do not allow.
    """

    label: str
    bits_per_byte: float | None
    num_bytes: int = 0
    against_before: Estimate | None = None
    against_gold_only: Estimate | None = None
    refused: str | None = None


def held_out(runs: Sequence[ResolvedRun], store: Store) -> list[HeldOutRow]:
    """Every evaluated model once: sources and target, baselines, then what each configuration trained."""
    rows: list[HeldOutRow] = []
    shown: set[str] = set()
    for is_baseline in (False, True):
        for run in runs:
            for label, step in untrained(run):
                if step.folder in shown or is_baseline != (step.model in BASELINE_LABELS):
                    continue
                shown.add(step.folder)
                references = _references(run, runs, store) if is_baseline else (None, None)
                rows.append(_held_out_row(label, read_result(store, step), *references))
    for run in runs:
        label = f"after {run.config.name} ({_describe(run)})"
        fused = read_result(store, run.steps[f"eval/{FUSED}"])
        rows.append(_held_out_row(label, fused, *_references(run, runs, store)))
    return rows


def untrained(run: ResolvedRun) -> list[tuple[str, Step]]:
    """What a run evaluates without training it, for people and as steps: the sources, the target, the baselines."""
    where = _split(run)
    labels = {model.name: f"source {model.name}{where}" for model in run.config.sources}
    labels[run.config.target.name] = f"target {run.config.target.name} before{where}"
    for baseline in run.config.baselines.methods:
        labels[baseline] = f"{BASELINE_LABELS[baseline]} ({_describe_baseline(run, baseline)})"
    return [(label, run.steps[f"eval/{name}"]) for name, label in labels.items()]


def _references(run: ResolvedRun, runs: Sequence[ResolvedRun], store: Store) -> tuple[_Result, _Result]:
    """What a run's figures are compared with: the target before training, and training on the gold tokens alone."""
    before = _target_before(run)
    peers = [other for other in runs if _target_before(other).fingerprint == before.fingerprint]
    gold_only = [peer.steps[f"eval/{FUSED}"] for peer in peers if peer.config.train.lambda_ == 1]
    return read_result(store, before), _first_result(gold_only, store)


def held_out_table(rows: Sequence[HeldOutRow]) -> ResultTable:
    """The rows for people."""
    return ResultTable(
        "Held-out text (differences: over all bytes ± standard error over documents)",
        ("model", "bits per byte", "against target before", "against gold only", "bytes"),
        tuple(
            (f"{row.label}; refused: {row.refused}", "refused", "", "", "")
            if row.refused
            else (row.label, "not evaluated", "", "", "")
            if row.bits_per_byte is None
            else (
                row.label,
                f"{row.bits_per_byte:.4f}",
                _difference(row.against_before),
                _difference(row.against_gold_only),
                f"{row.num_bytes:,}",
            )
            for row in rows
        ),
    )


def paired_difference(result: Mapping[str, Any], baseline: Mapping[str, Any]) -> Estimate:
    """Difference in bits per byte on the same documents, and its standard error over documents.

    Args:
        result: an evaluation, as ``read_result`` gives it.
        baseline: the evaluation it is compared with.

    Returns:
        result - baseline over all bytes (negative: better), and the standard error of that difference, from the
        documents' differences weighted by their bytes (the ratio estimator); NaN for fewer than two documents.
    """
    return weighted_mean(*document_differences(result, baseline))


def document_differences(result: Mapping[str, Any], baseline: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Each document's difference in bits per byte, (D,), and its bytes, (D,): the documents that both evaluations have."""
    before = {part["doc_id"]: part for part in baseline["documents"]}
    pairs = [(part, before[part["doc_id"]]) for part in result["documents"] if part["doc_id"] in before]
    differences = np.array([part["bits_per_byte"] - other["bits_per_byte"] for part, other in pairs])
    return differences, np.array([part["num_bytes"] for part, _ in pairs], dtype=np.float64)


def _held_out_row(label: str, result: _Result, before: _Result, gold_only: _Result) -> HeldOutRow:
    if result is None:
        return HeldOutRow(label, None)
    if "refused" in result:
        return HeldOutRow(label, None, refused=result["refused"])
    against_before, against_gold_only = (
        None if baseline is None or baseline == result else paired_difference(result, baseline)
        for baseline in (before, gold_only)
    )
    return HeldOutRow(label, result["bits_per_byte"], result["num_bytes"], against_before, against_gold_only)


def _describe_baseline(run: ResolvedRun, baseline: Baseline) -> str:
    weights = run.config.baselines.source_weights(baseline, len(run.config.sources))
    parts = [f"{weight:.3g} {model.name}" for weight, model in zip(weights, run.config.sources, strict=True)]
    if baseline != ENSEMBLE:
        return " + ".join([f"{1 - sum(weights):.3g} {run.config.target.name}", *parts]) + _split(run)
    align, contexts = run.config.align, run.config.baselines.ensemble_contexts
    return f"{' + '.join(parts)}, {align.preset or align.marginals}, contexts by {contexts}{_split(run)}"


def _target_before(run: ResolvedRun) -> Step:
    """The run's target as it is before training. Its fingerprint says which weights and tokenizer it has, which documents
    are scored, and how: figures are compared where all of it agrees.
    """
    return run.steps[f"eval/{run.config.target.name}"]


def _split(run: ResolvedRun) -> str:
    return "" if run.config.eval.split == "validation" else f", {run.config.eval.split} split"


def _describe(run: ResolvedRun) -> str:
    train, align, where = run.config.train, run.config.align, _split(run)
    if train.lambda_ == 1:
        return f"gold tokens only{where}"
    return f"lambda {train.lambda_}, {align.preset or align.pairing + ' ' + align.marginals}{where}"


def _first_result(steps: list[Step], store: Store) -> _Result:
    return next((found for step in steps if (found := read_result(store, step)) is not None), None)


def _difference(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.mean:+.4f} ± {estimate.error:.4f}"
