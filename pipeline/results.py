"""What came out of a run directory, as rows: shown by ``ptafuse report`` in the terminal and in the HTML page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pipeline.display.table import ResultTable
from pipeline.run.outcomes import read_result, read_training_log, training_seconds
from pipeline.run.steps import FUSED, ResolvedRun, Step
from pipeline.settings.baselines import BASELINE_LABELS, ENSEMBLE, Baseline
from pipeline.state.status import RunStatus, StepStatus
from stages.contract.manifest import Figure, Mean
from stages.contract.store import Store
from stages.measures.standard_error import Estimate, weighted_mean

_Result = dict[str, Any] | None
"""A model's figures, as ``read_result`` gives them."""


# --- held-out text ---------------------------------------------------------------------------------------------------


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


# --- teacher NLL -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TeacherRow:
    """What one align or fuse step made; means in nats over the positions that it covers, None where nothing was counted.

    Attributes:
        run: the configuration.
        name: ``aligned <source>`` or ``fused``.
        nll: of the gold next token under the distribution.
        target_nll: under the target's own top-k at the same positions.
        source_nll: of the source's own next token under the source; None for fused rows.
        coverage: share of positions with a distribution.
        exact_contexts: share of positions where both models condition on the same text.
        mass_moved: share of the mass that landed on a token of another text.
        source_entropy: of the source's window; ``aligned_entropy``: of what came of it.
    """

    run: str
    name: str
    nll: float | None
    target_nll: float | None
    source_nll: float | None
    coverage: float | None
    exact_contexts: float | None
    mass_moved: float | None
    source_entropy: float | None
    aligned_entropy: float | None


def teacher_rows(runs: Sequence[ResolvedRun], statuses: Mapping[str, RunStatus]) -> list[TeacherRow]:
    """One row for every align and fuse folder that has figures."""
    rows, shown = [], set()
    for run in runs:
        for step in statuses[run.config.name].steps:
            key, health, folder = step.key, step.health, run.steps[step.key].folder
            if not key.startswith(("align/", "fuse")) or not health or folder in shown:
                continue
            shown.add(folder)
            means = {name: _mean(health.get(name)) for name in _TEACHER_MEANS}
            rows.append(
                TeacherRow(
                    run=run.config.name,
                    name=f"aligned {key.removeprefix('align/')}" if key.startswith("align/") else "fused",
                    nll=means["teacher_nll"],
                    target_nll=means["target_nll"],
                    source_nll=means["source_nll"],
                    coverage=_share(health.get("covered", health.get("fused")), health.get("positions")),
                    exact_contexts=_share(health.get("exact_contexts"), health.get("positions")),
                    mass_moved=means["mass_moved"],
                    source_entropy=means["source_entropy"],
                    aligned_entropy=means["aligned_entropy"],
                )
            )
    return rows


_TEACHER_MEANS: Final = ("teacher_nll", "target_nll", "source_nll", "mass_moved", "source_entropy", "aligned_entropy")


def teacher_table(rows: Sequence[TeacherRow]) -> ResultTable:
    """The rows for people."""
    return ResultTable(
        "Teacher NLL: mean -ln p(gold next token), floor 1e-4, in nats; lower is better (steps shared by "
        "configurations once)",
        (
            "configuration",
            "distribution",
            "NLL",
            "target's own there",
            "source itself",
            "coverage",
            "exact contexts",
            "mass moved",
            "entropy before, after",
        ),
        tuple(
            (
                row.run,
                row.name,
                _nats(row.nll),
                _nats(row.target_nll),
                _nats(row.source_nll),
                _percent(row.coverage),
                _percent(row.exact_contexts),
                _percent(row.mass_moved),
                "" if row.source_entropy is None else f"{_nats(row.source_entropy)}, {_nats(row.aligned_entropy)}",
            )
            for row in rows
        ),
        text_columns=(0, 1),
    )


def _mean(figure: Figure | None) -> float | None:
    return figure.value if isinstance(figure, Mean) and figure.count else None


def _share(part: Figure | None, whole: Figure | None) -> float | None:
    return part / whole if isinstance(part, int) and isinstance(whole, int) and whole else None


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


# --- time ------------------------------------------------------------------------------------------------------------


def time_table(runs: Sequence[ResolvedRun], statuses: Mapping[str, RunStatus], store: Store) -> ResultTable:
    """Seconds and tokens of every step that computed something."""
    rows, shown = [], set()
    for run in runs:
        for step in statuses[run.config.name].steps:
            folder = run.steps[step.key].folder
            if folder in shown:
                continue
            shown.add(folder)
            seconds, tokens = _seconds(step, run, store)
            if seconds:
                rows.append((step.key, run.config.name, f"{seconds:.1f}", f"{tokens:,}", f"{tokens / seconds:,.0f}"))
    return ResultTable(
        "Seconds of computing (start-up left out), shared steps once",
        ("step", "configuration", "seconds", "tokens", "tokens/s"),
        tuple(rows),
        text_columns=(0, 1),
    )


def _seconds(status: StepStatus, run: ResolvedRun, store: Store) -> tuple[float, int]:
    step = run.steps[status.key]
    if step.stage == "eval":
        result = read_result(store, step) or {}
        return result.get("seconds", 0.0), result.get("num_tokens", 0)
    if step.stage == "train":
        return training_seconds(read_training_log(step, store))
    return status.seconds, status.num_tokens
