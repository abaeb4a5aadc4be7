"""What came out: held-out bits per byte, teacher NLL, coverage and time, of every configuration in a run directory."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.evaluation import read_result
from pipeline.plan import FUSED, ResolvedRun, Step, recorded_runs
from pipeline.status import StepStatus, read_status
from stages.contract.manifest import Mean
from stages.contract.store import Store


def print_report(store: Store, console: Console) -> None:
    """Print the tables of everything that was computed in a run directory.

    Raises:
        ValueError: nothing has run there.
    """
    runs = recorded_runs(store)
    if not runs:
        raise ValueError(
            f"{store.url}: no configuration has run here; start with `make demo` or `make shard RUN={store.url}`"
        )
    console.print(_held_out_table(runs, store))
    statuses = {run.config.name: _steps(run, store) for run in runs}
    console.print(_teacher_table(runs, statuses))
    console.print(_time_table(runs, statuses, store))


def paired_difference(result: Mapping[str, Any], baseline: Mapping[str, Any]) -> tuple[float, float]:
    """Difference in bits per byte on the same documents, and its standard error over documents.

    Args:
        result: an evaluation, as ``read_result`` gives it.
        baseline: the evaluation it is compared with.

    Returns:
        result - baseline over all bytes (negative: better), and the standard error of that difference, from the
        documents' differences weighted by their bytes (the ratio estimator); NaN for fewer than two documents.
    """
    before = {part["doc_id"]: part for part in baseline["documents"]}
    pairs = [(part, before[part["doc_id"]]) for part in result["documents"] if part["doc_id"] in before]
    weights = np.array([part["num_bytes"] for part, _ in pairs], dtype=np.float64)
    differences = np.array([part["bits_per_byte"] - other["bits_per_byte"] for part, other in pairs])
    mean = float(np.average(differences, weights=weights)) if pairs else math.nan
    if len(pairs) < 2:
        return mean, math.nan
    shares = weights / weights.sum()
    spread = shares * (differences - mean)
    return mean, float(np.sqrt(len(pairs) / (len(pairs) - 1) * (spread**2).sum()))


def _held_out_table(runs: list[ResolvedRun], store: Store) -> Table:
    table = Table(
        title="Held-out text (differences: over all bytes ± standard error over documents)", title_justify="left"
    )
    for column in ("model", "bits per byte", "against target before", "against gold only", "bytes"):
        table.add_column(column, justify="left" if column == "model" else "right")
    before = _first_result([run.steps[f"eval/{run.config.target.name}"] for run in runs], store)
    gold_only = _first_result([run.steps[f"eval/{FUSED}"] for run in runs if run.config.train.lambda_ == 1], store)
    shown: set[str] = set()
    for run in runs:
        labels = {model.name: f"source {model.name}" for model in run.config.sources}
        labels[run.config.target.name] = f"target {run.config.target.name} before"
        for name, label in labels.items():
            step = run.steps[f"eval/{name}"]
            if step.folder not in shown:
                shown.add(step.folder)
                _add_result(table, label, read_result(store, step), ())
    for run in runs:
        label = f"after {run.config.name} ({_describe(run)})"
        _add_result(table, label, read_result(store, run.steps[f"eval/{FUSED}"]), (before, gold_only))
    return table


def _describe(run: ResolvedRun) -> str:
    train, align = run.config.train, run.config.align
    if train.lambda_ == 1:
        return "gold tokens only"
    return f"lambda {train.lambda_}, {align.preset or align.pairing + ' ' + align.marginals}"


def _first_result(steps: list[Step], store: Store) -> dict[str, Any] | None:
    return next((found for step in steps if (found := read_result(store, step)) is not None), None)


def _add_result(
    table: Table, label: str, result: dict[str, Any] | None, baselines: tuple[dict[str, Any] | None, ...]
) -> None:
    if result is None:
        table.add_row(label, "not evaluated")
        return
    changes = [""] * (2 - len(baselines))
    for baseline in baselines:
        if baseline is None or baseline == result:
            changes.append("")
        else:
            difference, error = paired_difference(result, baseline)
            changes.append(f"{difference:+.4f} ± {error:.4f}")
    table.add_row(label, f"{result['bits_per_byte']:.4f}", *changes, f"{result['num_bytes']:,}")


def _steps(run: ResolvedRun, store: Store) -> dict[str, StepStatus]:
    return {step.key: step for step in read_status(run, store).steps}


def _teacher_table(runs: list[ResolvedRun], statuses: Mapping[str, Mapping[str, StepStatus]]) -> Table:
    table = Table(
        title="Teacher NLL: mean -ln p(gold next token), floor 1e-4, in nats; lower is better (steps shared by "
        "configurations once)",
        title_justify="left",
    )
    for column in ("configuration", "distribution", "NLL", "target's own there", "coverage", "exact contexts"):
        table.add_column(column, justify="left" if column in ("configuration", "distribution") else "right")
    shown: set[str] = set()
    for run in runs:
        for key, step in statuses[run.config.name].items():
            health, folder = step.health, run.steps[key].folder
            if not key.startswith(("align/", "fuse")) or not health or folder in shown:
                continue
            shown.add(folder)
            name = f"aligned {key.removeprefix('align/')}" if key.startswith("align/") else "fused"
            covered = health.get("covered", health.get("fused"))
            table.add_row(
                run.config.name,
                name,
                _mean(health.get("teacher_nll")),
                _mean(health.get("target_nll")),
                _share(covered, health.get("positions")),
                _share(health.get("exact_contexts"), health.get("positions")),
            )
    return table


def _time_table(runs: list[ResolvedRun], statuses: Mapping[str, Mapping[str, StepStatus]], store: Store) -> Table:
    table = Table(title="Seconds of computing (start-up left out), shared steps once", title_justify="left")
    for column in ("step", "configuration", "seconds", "tokens", "tokens/s"):
        table.add_column(column, justify="left" if column in ("step", "configuration") else "right")
    shown: set[str] = set()
    for run in runs:
        for key, step in run.steps.items():
            if step.folder in shown:
                continue
            shown.add(step.folder)
            seconds, tokens = _seconds(statuses[run.config.name][key], run, key, store)
            if seconds:
                table.add_row(key, run.config.name, f"{seconds:.1f}", f"{tokens:,}", f"{tokens / seconds:,.0f}")
    return table


def _seconds(status: StepStatus, run: ResolvedRun, key: str, store: Store) -> tuple[float, int]:
    step = run.steps[key]
    if step.stage == "eval":
        result = read_result(store, step) or {}
        return result.get("seconds", 0.0), result.get("num_tokens", 0)
    if step.stage == "train":
        return _training_seconds(f"{step.folder}/log.jsonl", store)
    return sum(manifest.seconds for manifest in status.manifests.values()), status.num_tokens


def _training_seconds(log_key: str, store: Store) -> tuple[float, int]:
    """Seconds in optimizer steps, and tokens, from the step log."""
    if not store.exists(log_key):
        return 0.0, 0
    seconds, before = 0.0, 0
    for line in store.read(log_key).splitlines():
        record = json.loads(line)
        seconds += (record["num_tokens"] - before) / record["tokens_per_second"]
        before = record["num_tokens"]
    return seconds, before


def _mean(figure: int | Mean | None) -> str:
    return f"{figure.value:.3f}" if isinstance(figure, Mean) and figure.count else ""


def _share(part: int | Mean | None, whole: int | Mean | None) -> str:
    return f"{part / whole:.1%}" if isinstance(part, int) and isinstance(whole, int) and whole else ""
