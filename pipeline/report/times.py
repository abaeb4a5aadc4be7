"""Seconds and tokens of the steps of a run."""

from collections.abc import Mapping, Sequence

from pipeline.display.table import ResultTable
from pipeline.run.outcomes import read_result, read_training_log, training_seconds
from pipeline.run.stage_table import job_stage
from pipeline.run.steps import ResolvedRun
from pipeline.state.status import RunStatus, StepStatus
from stages.contract.store import Store


def time_table(runs: Sequence[ResolvedRun], statuses: Mapping[str, RunStatus], store: Store) -> ResultTable:
    """Build the table of seconds and tokens of every step that computed something.

    Keys of ``statuses`` are the runs' labels.
    """
    rows, shown = [], set()
    for run in runs:
        for step in statuses[run.label].steps:
            folder = run.steps[step.key].folder
            if folder in shown:
                continue
            shown.add(folder)
            seconds, tokens = _seconds(step, run, store)
            if seconds:
                rows.append((step.key, run.label, f"{seconds:.1f}", f"{tokens:,}", f"{tokens / seconds:,.0f}"))
    return ResultTable(
        "Seconds of compute time (without start-up); shared steps appear once",
        ("step", "configuration", "seconds", "tokens", "tokens/s"),
        tuple(rows),
        text_columns=(0, 1),
    )


def _seconds(status: StepStatus, run: ResolvedRun, store: Store) -> tuple[float, int]:
    step = run.steps[status.key]
    if step.is_sharded:
        return status.seconds, status.num_tokens
    if job_stage(step.stage).keeps_log:
        return training_seconds(read_training_log(step, store))
    result = read_result(store, step) or {}
    return result.get("seconds", 0.0), result.get("num_tokens", 0)
