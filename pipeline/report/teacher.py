"""Teacher NLL of the distributions that align and fuse wrote."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pipeline.display.table import ResultTable
from pipeline.run.stage_table import sharded_stage
from pipeline.run.steps import ResolvedRun
from pipeline.state.status import RunStatus
from stages.contract.manifest import Health, HealthMetric, Mean

CHOSEN_BY_GOLD: Final = "chosen_by_gold"
"""Fuse's count of positions at which the gold token decided what is taught; prefix of their metrics."""


@dataclass(frozen=True)
class TeacherRow:
    """Result of one align or fuse step; means in nats over the positions that it covers, None if nothing was counted.

    Attributes:
        run: the configuration's label.
        name: ``aligned <source>``, ``fused``, or ``fused, chosen by the gold token``: positions at which the gold token
            decided what is taught; their metrics must not be compared with others.
        completed_nll: NLL of the gold next token under the distribution, whose tail is divided as the target divides it;
            infinite where ``excluded`` is above 0.
        target_exact_nll: under the target at the same positions.
        source_exact_nll: NLL of the source's own next token under the source; None for fused rows.
        excluded: share of the positions at which the distribution, rescaled to 1, does not list the gold token.
        floored_nll: under the distribution rescaled to 1, floor 1e-4.
        target_floored_nll: under the target's own top-k, computed alike.
        coverage: share of positions with a distribution.
        exact_contexts: share of positions where both models condition on the same text.
        mass_moved: share of the mass that landed on a token of another text.
        source_entropy: entropy of the source's window; ``aligned_entropy``: of the row that it was aligned to.
    """

    run: str
    name: str
    completed_nll: float | None
    target_exact_nll: float | None
    source_exact_nll: float | None
    excluded: float
    floored_nll: float | None
    target_floored_nll: float | None
    coverage: float | None
    exact_contexts: float | None
    mass_moved: float | None
    source_entropy: float | None
    aligned_entropy: float | None


def teacher_rows(runs: Sequence[ResolvedRun], statuses: Mapping[str, RunStatus]) -> list[TeacherRow]:
    """Build one row for every align and fuse folder with health metrics; ``statuses`` by the runs' labels."""
    rows, shown = [], set()
    for run in runs:
        for step in statuses[run.label].steps:
            health, resolved = step.health, run.steps[step.key]
            if not health or not resolved.is_sharded or resolved.folder in shown:
                continue
            distribution = sharded_stage(resolved.stage).distribution
            if distribution is None:
                continue
            shown.add(resolved.folder)
            name = distribution if resolved.model is None else f"{distribution} {resolved.model}"
            rows.append(_teacher_row(run.label, name, health, ""))
            if health.get(CHOSEN_BY_GOLD):
                rows.append(_teacher_row(run.label, f"{name}, chosen by the gold token", health, f"{CHOSEN_BY_GOLD}/"))
    return rows


def _teacher_row(run: str, name: str, health: Health, prefix: str) -> TeacherRow:
    """Build a row from a step's health metrics, or from those whose names have a prefix."""

    def mean(figure: str) -> float | None:
        return _mean(health.get(prefix + figure))

    chosen = _count(health, CHOSEN_BY_GOLD)
    covered = chosen if prefix else _count(health, "covered") + _count(health, "fused") - chosen
    excluded = _count(health, f"{prefix}gold_excluded")
    return TeacherRow(
        run=run,
        name=name,
        completed_nll=math.inf if excluded else mean("completed_nll"),
        target_exact_nll=mean("target_exact_nll"),
        source_exact_nll=mean("source_exact_nll"),
        excluded=_share(excluded, covered) or 0.0,
        floored_nll=mean("floored_nll"),
        target_floored_nll=mean("target_floored_nll"),
        coverage=_share(covered, health.get("positions")),
        exact_contexts=_share(health.get("exact_contexts"), health.get("positions")),
        mass_moved=mean("mass_moved"),
        source_entropy=mean("source_entropy"),
        aligned_entropy=mean("aligned_entropy"),
    )


def teacher_table(rows: Sequence[TeacherRow]) -> ResultTable:
    """Build the table of how well the distributions predict the gold tokens, for people."""
    return ResultTable(
        "Teacher NLL: mean -ln p(gold next token) in nats, lower is better; next to each figure the models' own, "
        "computed in the same way on the same positions. Completed: what a row does not list is divided in the "
        "target's proportions. Floored: rows rescaled to 1, at least 1e-4. Steps shared by configurations appear once",
        (
            "configuration",
            "distribution",
            "completed",
            "target",
            "source",
            "floored",
            "target",
            "covers",
        ),
        tuple(
            (
                row.run,
                row.name,
                _nats(row.completed_nll),
                _nats(row.target_exact_nll),
                _nats(row.source_exact_nll),
                _nats(row.floored_nll),
                _nats(row.target_floored_nll),
                _percent(row.coverage),
            )
            for row in rows
        ),
        text_columns=(0, 1),
        notes=_notes(rows),
    )


def moved_table(rows: Sequence[TeacherRow]) -> ResultTable:
    """Build the table of what aligning changed in the sources' distributions, for people."""
    return ResultTable(
        "What alignment moved: positions where both models condition on the same text; mass that landed on a token of "
        "another text; entropy of the source's window before and after, nats",
        ("configuration", "distribution", "exact contexts", "mass moved", "entropy before", "after"),
        tuple(
            (
                row.run,
                row.name,
                _percent(row.exact_contexts),
                _percent(row.mass_moved),
                _nats(row.source_entropy),
                _nats(row.aligned_entropy),
            )
            for row in rows
            if row.source_entropy is not None
        ),
        text_columns=(0, 1),
    )


def _notes(rows: Sequence[TeacherRow]) -> tuple[str, ...]:
    excluding = "; ".join(f"{row.run}, {row.name}: {row.excluded:.1%}" for row in rows if row.excluded)
    if not excluding:
        return ()
    note = (
        "inf: a row rescaled to 1 gives no probability to tokens that it does not list; the share of positions where "
        f"this is the gold token: {excluding}. `ptafuse compare` shows the completed NLL of every method."
    )
    return (note,)


def _count(health: Health, name: str) -> int:
    figure = health.get(name, 0)
    return figure if isinstance(figure, int) else 0


def _mean(figure: HealthMetric | None) -> float | None:
    return figure.value if isinstance(figure, Mean) and figure.count else None


def _share(count: HealthMetric | None, whole: HealthMetric | None) -> float | None:
    return count / whole if isinstance(count, int) and isinstance(whole, int) and whole else None


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
