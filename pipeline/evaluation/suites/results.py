"""Results of the suites in a run directory, as tables.

A suite's metric is over all documents of the sub-tasks that ran.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pipeline.display.table import ResultTable
from pipeline.evaluation.suites.catalogue import SUITES, Metric
from pipeline.evaluation.suites.figures import difference, figure
from pipeline.evaluation.suites.run import FOLDER, model_inputs
from pipeline.run.stage_table import FUSED
from pipeline.run.steps import ResolvedRun
from stages.contract.fingerprint import canonical_json
from stages.contract.store import Store
from stages.measures.standard_error import Estimate

Result = Mapping[str, Any]
FEW_SUBTASKS: Final = 4
"""Number of names in the table of suites; the table of sub-tasks has all."""


@dataclass(frozen=True)
class SuiteRow:
    """Result of a model for one metric of a suite.

    Attributes:
        suite: name of the suite.
        metric: metric of the suite.
        model: display name of the model.
        subtasks: the sub-tasks that ran.
        num_subtasks: number of sub-tasks of the whole suite.
        num_documents: number of documents that were evaluated, over all sub-tasks.
        num_fewshot: examples before each question.
        as_chat: questions were asked under the model's chat template.
        figure: over all those documents.
        against_before: difference to the target before training, paired by document; None for the target itself, for
            sources, and where the target did not go through the same documents.
    """

    suite: str
    metric: Metric
    model: str
    subtasks: tuple[str, ...]
    num_subtasks: int
    num_documents: int
    num_fewshot: int
    as_chat: bool
    figure: Estimate
    against_before: Estimate | None


def suite_rows(runs: Sequence[ResolvedRun], store: Store) -> list[SuiteRow]:
    """Collect the results of the models of these runs: suites in their order, then models in the runs' order."""
    models = _models(runs)
    order = list(SUITES)
    rows = []
    groups = sorted(_grouped(_results(store)).items(), key=lambda item: (order.index(item[0][0]), item[0][1:]))
    for (name, *_), by_model in groups:
        for metric in SUITES[name].metrics:
            for model in (model for model in models if model in by_model):
                baseline = by_model.get(models[model].before or "")
                rows.append(_row(name, metric, models[model].label, by_model[model], baseline))
    return rows


def suite_table(rows: Sequence[SuiteRow]) -> ResultTable:
    """Build the table of the rows, for people."""
    return ResultTable(
        "Benchmarks (figure ± standard error over documents; differences paired by document; all documents have the "
        "same weight)",
        ("suite", "figure", "model", "value", "against target before", "documents", "sub-tasks", "shots"),
        tuple(
            (
                row.suite,
                row.metric.label,
                row.model,
                _shown(row.figure, row.metric),
                "" if row.against_before is None else _shown(row.against_before, row.metric, signed=True),
                f"{row.num_documents:,}",
                _subtasks(row),
                _shots(row.num_fewshot, row.as_chat),
            )
            for row in rows
        ),
        text_columns=(0, 1, 2, 6),
    )


def subtask_table(runs: Sequence[ResolvedRun], store: Store) -> ResultTable:
    """Build the table of every sub-task's headline metric, and of what it was computed with."""
    models = _models(runs)
    results = [result for result in _results(store) if canonical_json(result["model_inputs"]) in models]
    order = list(models)
    results.sort(
        key=lambda result: (
            list(SUITES).index(result["suite"]),
            result["subtask"],
            order.index(canonical_json(result["model_inputs"])),
        )
    )
    return ResultTable(
        "Sub-tasks",
        ("sub-task", "model", "figure", "value", "documents", "prompts cut", "shots", "data", "harness"),
        tuple(
            (
                f"{result['suite']}/{result['subtask']}",
                models[canonical_json(result["model_inputs"])].label,
                metric.label,
                _shown(figure(_values([result], metric), metric.kind), metric),
                f"{result['num_documents']:,} of {result['num_documents_in_data']:,}",
                str(result["num_truncated_prompts"]),
                _shots(result["settings"]["num_fewshot"], _is_chat(result)),
                "hub" if result["data"] == "hub" else f"local, {result['data'][:19]}",
                result["settings"]["harness"],
            )
            for result in results
            for metric in SUITES[result["suite"]].metrics[:1]
        ),
        text_columns=(0, 1, 2, 7, 8),
    )


@dataclass(frozen=True)
class _Model:
    label: str
    before: str | None


def _models(runs: Sequence[ResolvedRun]) -> dict[str, _Model]:
    """Map what identifies a model to its label and its target before training; each model once, in the runs' order."""
    models: dict[str, _Model] = {}
    for run in runs:
        target = run.config.target.name
        labels = {target: f"target {target} before"} | {
            model.name: f"source {model.name}" for model in run.config.evaluated_sources
        }
        for name, label in labels.items():
            is_taken = label in {model.label for model in models.values()}
            models.setdefault(_identity(run, name), _Model(f"{label}, {run.label}" if is_taken else label, None))
    for run in runs:
        models.setdefault(_identity(run, FUSED), _Model(f"after {run.label}", _identity(run, run.config.target.name)))
    return models


def _identity(run: ResolvedRun, model: str) -> str:
    return canonical_json(model_inputs(run.steps[f"eval/{model}"]))


def _results(store: Store) -> list[dict[str, Any]]:
    keys = [entry.key for entry in store.files(FOLDER) if entry.key.endswith(".json")]
    return [json.loads(raw) for _, raw in sorted(store.read_all(keys))]


def _grouped(results: Sequence[Result]) -> dict[tuple[str, str, int], dict[str, list[Result]]]:
    """Group results by (suite, settings, number of the data) -> model -> sub-tasks.

    A sub-task that was evaluated on other files later is another row, not the same documents twice.
    """
    data: dict[tuple[str, str, str], list[str]] = {}
    groups: dict[tuple[str, str, int], dict[str, list[Result]]] = {}
    for result in sorted(results, key=lambda result: result["data"]):
        suite, settings = result["suite"], _settings(result)
        seen = data.setdefault((suite, settings, result["subtask"]), [])
        if result["data"] not in seen:
            seen.append(result["data"])
        group = groups.setdefault((suite, settings, seen.index(result["data"])), {})
        group.setdefault(canonical_json(result["model_inputs"]), []).append(result)
    return groups


def _settings(result: Result) -> str:
    """Return the settings that results of one suite must share to be combined into one figure."""
    return canonical_json({name: value for name, value in result["settings"].items() if name != "subtask"})


def _row(
    name: str, metric: Metric, label: str, results: Sequence[Result], baseline: Sequence[Result] | None
) -> SuiteRow:
    results = sorted(results, key=_subtask)
    values = _values(results, metric)
    against = None
    if baseline is not None and _documents(results) == _documents(sorted(baseline, key=_subtask)):
        against = difference(values, _values(sorted(baseline, key=_subtask), metric), metric.kind)
    return SuiteRow(
        suite=name,
        metric=metric,
        model=label,
        subtasks=tuple(result["subtask"] for result in results),
        num_subtasks=results[0]["num_subtasks"],
        num_documents=sum(result["num_documents"] for result in results),
        num_fewshot=results[0]["settings"]["num_fewshot"],
        as_chat=_is_chat(results[0]),
        figure=figure(values, metric.kind),
        against_before=against,
    )


def _is_chat(result: Result) -> bool:
    return bool(result["settings"].get("apply_chat_template"))


def _shots(num_fewshot: int, as_chat: bool) -> str:
    return f"{num_fewshot}, chat" if as_chat else str(num_fewshot)


def _subtask(result: Result) -> tuple[str, str]:
    return result["subtask"], result["data"]


def _values(results: Sequence[Result], metric: Metric) -> list[np.ndarray]:
    return [np.array(result["documents"][metric.key]) for result in results]


def _documents(results: Sequence[Result]) -> list[tuple[str, str, int]]:
    return [(result["subtask"], result["data"], result["num_documents"]) for result in results]


def _subtasks(row: SuiteRow) -> str:
    if len(row.subtasks) == row.num_subtasks:
        return "all" if row.num_subtasks == 1 else f"all {row.num_subtasks}"
    count = f"{len(row.subtasks)} of {row.num_subtasks}"
    return count if len(row.subtasks) > FEW_SUBTASKS else f"{count}: {', '.join(row.subtasks)}"


def _shown(estimate: Estimate, metric: Metric, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    scale, digits, unit = (1, 2, "") if metric.kind == "perplexity" else (100, 1, " %")
    error = "" if math.isnan(estimate.error) else f" ± {scale * estimate.error:.{digits}f}"
    return f"{scale * estimate.mean:{sign}.{digits}f}{unit}{error}"
