"""Teacher NLL of what align and fuse made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pipeline.display.table import ResultTable
from pipeline.run.stage_table import sharded_stage
from pipeline.run.steps import ResolvedRun
from pipeline.state.status import RunStatus
from stages.contract.manifest import Figure, Mean


@dataclass(frozen=True)
class TeacherRow:
    """What one align or fuse step made; means in nats over the positions that it covers, None where nothing was counted.

    Attributes:
        run: the configuration's label.
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
    """One row for every align and fuse folder that has figures; ``statuses`` by the runs' labels."""
    rows, shown = [], set()
    for run in runs:
        for step in statuses[run.label].steps:
            health, resolved = step.health, run.steps[step.key]
            if not health or resolved.folder in shown:
                continue
            distribution = sharded_stage(resolved.stage).distribution
            if distribution is None:
                continue
            shown.add(resolved.folder)
            means = {name: _mean(health.get(name)) for name in _TEACHER_MEANS}
            rows.append(
                TeacherRow(
                    run=run.label,
                    name=distribution if resolved.model is None else f"{distribution} {resolved.model}",
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
