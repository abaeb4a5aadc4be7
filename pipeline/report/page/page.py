"""``ptafuse report --html``: the contents of a run directory as one HTML file that opens from disk."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from typing import Any, Final

import jinja2

from pipeline.display.table import ResultTable
from pipeline.evaluation.suites.catalogue import SUITES
from pipeline.evaluation.suites.results import SuiteRow, subtask_table, suite_rows, suite_table
from pipeline.report.held_out import HeldOutRow, held_out, held_out_table
from pipeline.report.page.interpretation import described_interpretations
from pipeline.report.page.plots import Bar, bars, curves
from pipeline.report.page.viewer import viewer_data
from pipeline.report.reported import reported_runs, runs_by_folder
from pipeline.report.sweeps import summary_of, sweep_results, sweep_tables
from pipeline.report.teacher import TeacherRow, moved_table, teacher_rows, teacher_table
from pipeline.report.texts import TextReport, text_reports, text_tables
from pipeline.report.times import time_table
from pipeline.report.weights import weight_table
from pipeline.run.outcomes import read_training_log
from pipeline.run.stage_table import FUSED
from pipeline.run.steps import ResolvedRun, result_key
from pipeline.state.status import RunStatus, StepStatus, read_status
from pipeline.state.status_view import shown_metric
from pipeline.workflow.sweep import SweepConfig, cells_of, recorded_sweeps, sweep_runs
from stages.contract.store import Store

DEFAULT_POSITIONS: Final = 6000
"""Positions in the document viewer, about 0.8 kB each."""
MAX_CELLS_SHOWN: Final = 4
"""Largest number of cells of a sweep whose configurations are shown like any other."""
SECTIONS: Final = (
    "Summary",
    "Benchmarks",
    "Teacher",
    "Interpretation",
    "Training",
    "Sweeps",
    "Stages",
    "Documents",
    "Settings",
)


def report_page(store: Store, *, max_positions: int = DEFAULT_POSITIONS) -> str:
    """Render the page of a run directory: tables, plots and a document viewer, without references to anything outside.

    Args:
        store: the run directory.
        max_positions: target positions in the document viewer, over all configurations.

    Raises:
        ValueError: nothing has run there.
    """
    every = reported_runs(store)
    if not every:
        raise ValueError(
            f"{store.url}: no configuration has been run here; start with `make demo` or `make shard RUN={store.url}`"
        )
    sweeps = recorded_sweeps(store)
    runs = _shown_by_themselves(every, sweeps, store)
    statuses = {run.label: read_status(run, store) for run in runs}
    results = held_out(runs, store, peers=every)
    teachers = teacher_rows(runs, statuses)
    benchmarks = suite_rows(runs, store)
    viewer = viewer_data(runs, store, max_positions=max_positions)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_asset("template.html")).render(
        title=store.url.rstrip("/").rsplit("/", 1)[-1],
        url=store.url,
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        version=metadata.version("ptafuse"),
        sections=SECTIONS,
        warnings=list(dict.fromkeys(warning for status in statuses.values() for warning in status.warnings)),
        runs=[_described(run, statuses[run.label]) for run in runs],
        held_out=held_out_table(results),
        held_out_plot=_held_out_plot(results),
        texts=[_described_text(report) for report in text_reports(runs, store, peers=every)],
        has_benchmarks=bool(benchmarks),
        benchmarks=suite_table(benchmarks),
        benchmark_plot=_benchmark_plot(benchmarks),
        subtasks=subtask_table(runs, store),
        teacher=teacher_table(teachers),
        moved=moved_table(teachers),
        teacher_plot=_teacher_plot(teachers),
        weights=weight_table(runs, store),
        interpretations=described_interpretations(runs, store),
        loss_plot=_loss_plot(runs, store),
        sweeps=[_described_sweep(sweep, store) for sweep in sweeps],
        times=time_table(runs, statuses, store),
        stage_health=_health_tables(runs, statuses),
        has_documents=bool(viewer["views"]),
        viewer=_embedded(viewer),
        css=_asset("page.css"),
        js=_asset("page.js"),
    )


def _shown_by_themselves(runs: list[ResolvedRun], sweeps: Sequence[SweepConfig], store: Store) -> list[ResolvedRun]:
    """Leave out the configurations of large sweeps, which have a table of their own; at least one run stays.

    What took a cell's name, and is not in the sweep's table, stays if it is evaluated.
    """
    large = [sweep for sweep in sweeps if len(cells_of(sweep)) * len(sweep.seeds) > MAX_CELLS_SHOWN]
    swept = [run for sweep in large for run in sweep_runs(sweep, store).values()]
    names = {run.config.name for run in swept}
    figures = {run.steps[f"eval/{FUSED}"].folder for run in swept}

    def stays(run: ResolvedRun) -> bool:
        step = run.steps[f"eval/{FUSED}"]
        return run.config.name not in names or (step.folder not in figures and store.exists(result_key(step)))

    return [run for run in runs if stays(run)] or runs[-1:]


def _asset(name: str) -> str:
    return resources.files("pipeline.report.page").joinpath(name).read_text(encoding="utf-8")


def _embedded(value: Mapping[str, Any]) -> str:
    """Return JSON that cannot end the script element that contains it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _described(run: ResolvedRun, status: RunStatus) -> dict[str, Any]:
    done = sum(step.is_done for step in status.steps)
    state = "everything is done" if status.next_command is None else f"next: {status.next_command}"
    return {
        "name": run.label,
        "target": run.config.target.name,
        "sources": ", ".join(model.name for model in run.config.sources),
        "state": f"{done} of {len(status.steps)} steps done; {state}",
        "steps": ResultTable(
            "Location of its results",
            ("step", "folder"),
            tuple((step.key, step.folder) for step in run.steps.values()),
            text_columns=(0, 1),
        ),
        "settings": run.config.model_dump_json(indent=1, by_alias=True),
    }


def _held_out_plot(rows: Sequence[HeldOutRow]) -> str:
    """Plot the differences to training on gold tokens only, the comparison that matters."""
    entries = [
        Bar(row.label, row.against_gold_only.mean, row.against_gold_only.error, group=index)
        for index, row in enumerate(rows)
        if row.against_gold_only is not None
    ]
    return bars(entries, axis="bits per byte, difference") if entries else ""


def _described_text(report: TextReport) -> dict[str, Any]:
    return {"name": report.name, "tables": text_tables(report), "plot": _held_out_plot(report.rows)}


def _benchmark_plot(rows: Sequence[SuiteRow]) -> str:
    """Plot the differences to the target before training in each suite's headline figure."""
    entries = [
        Bar(f"{row.suite}: {row.model}", 100 * row.against_before.mean, 100 * row.against_before.error)
        for row in rows
        if row.against_before is not None and row.metric == SUITES[row.suite].metrics[0]
    ]
    return bars(entries, axis="percentage points, difference") if entries else ""


def _teacher_plot(rows: Sequence[TeacherRow]) -> str:
    entries = []
    for row in rows:
        for group, (label, value) in enumerate(
            (
                (f"{row.run}: {row.name}", row.completed_nll),
                ("target there", row.target_exact_nll),
                ("source itself", row.source_exact_nll),
            )
        ):
            if value is not None and math.isfinite(value):
                entries.append(Bar(label, value, group=group))
    return bars(entries, axis="nats") if entries else ""


def _described_sweep(sweep: SweepConfig, store: Store) -> dict[str, Any]:
    results = sweep_results(sweep, store)
    entries = [
        Bar(result.name, result.against_baseline.mean, result.against_baseline.error)
        for result in results
        if result.against_baseline is not None and result.is_trained
    ]
    plot = bars(entries, axis=f"bits per byte, difference to {sweep.baseline}") if entries else ""
    return {
        "name": sweep.name,
        "tables": sweep_tables(sweep, store),
        "plot": plot,
        "plotted": summary_of(sweep).words,
    }


def _loss_plot(runs: Sequence[ResolvedRun], store: Store) -> str:
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for run, label, _ in runs_by_folder(runs, "train"):
        records = read_training_log(run.steps["train"], store)
        for field, title in (("loss_clm", "gold tokens, L_CLM"), ("loss_fusion", "fused distributions, L_fusion")):
            points = [(record["step"], record[field]) for record in records if record[field] is not None]
            if points:
                x, y = zip(*points, strict=True)
                panels.setdefault(title, {})[label] = (list(x), list(y))
    return curves(panels, axis="optimizer step") if panels else ""


def _health_tables(runs: Sequence[ResolvedRun], statuses: Mapping[str, RunStatus]) -> list[ResultTable]:
    tables: dict[str, ResultTable] = {}
    for run in runs:
        for step in statuses[run.label].steps:
            if step.health:
                tables.setdefault(run.steps[step.key].folder, _health_table(run, step))
    return list(tables.values())


def _health_table(run: ResolvedRun, step: StepStatus) -> ResultTable:
    rows = [(name, shown_metric(metric)) for name, metric in sorted(step.metrics.items())]
    done = f": {len(step.shards)} of {step.num_shards} shards" if run.steps[step.key].is_sharded else ""
    return ResultTable(f"{step.key} of {run.label}{done}", ("metric", "value"), tuple(rows), text_columns=(0,))
