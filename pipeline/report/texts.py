"""Bits per byte on texts other than the held-out split: for each text a table over all bytes, and one over kinds."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.display.table import ResultTable
from pipeline.evaluation.texts.describe import describe_counts
from pipeline.report.held_out import HeldOutRow, difference, held_out, held_out_table, in_precisions
from pipeline.run.stage_table import eval_key
from pipeline.run.steps import ResolvedRun
from stages.contract.fingerprint import canonical_json
from stages.contract.store import Store
from stages.measures.kinds import KindFigures
from stages.measures.standard_error import Estimate


@dataclass(frozen=True)
class TextReport:
    """Results of every model on one text.

    Attributes:
        name: the text's, with its runs where other runs have another text of that name.
        rows: one row per model, as for the held-out split.
    """

    name: str
    rows: tuple[HeldOutRow, ...]


def text_reports(
    runs: Sequence[ResolvedRun], store: Store, *, peers: Sequence[ResolvedRun] | None = None
) -> list[TextReport]:
    """Collect the results of every configuration on each of its texts.

    Args:
        runs: the configurations that are shown, the last used one last.
        store: the run directory.
        peers: runs to search for one on gold tokens only; ``runs`` by default.
    """
    by_name: dict[str, dict[str, list[ResolvedRun]]] = {}
    for run in runs:
        for text in run.config.eval.texts:
            by_name.setdefault(text.name, {}).setdefault(_identity(run, text.name), []).append(run)
    reports = []
    for name, groups in by_name.items():
        for identity, same in groups.items():
            others = [run for run in (runs if peers is None else peers) if _identity(run, name) == identity]
            label = name if len(groups) == 1 else f"{name} of {', '.join(run.label for run in same)}"
            reports.append(TextReport(label, tuple(held_out(same, store, peers=others, text=name))))
    return reports


def _identity(run: ResolvedRun, text: str) -> str:
    """Return what distinguishes a run's text from others of the same name: its documents, and how they are chosen."""
    step = run.steps.get(eval_key(run.config.target.name, text))
    return "" if step is None else canonical_json([step.settings["text"], step.settings["inputs"]["documents"]])


def text_tables(report: TextReport) -> list[ResultTable]:
    """Return the tables of a text: over all bytes, and over kinds where its documents have any."""
    counted = dict.fromkeys(describe_counts(row.counts) for row in report.rows if row.counts is not None)
    table = held_out_table(report.rows, f"Text {report.name}")
    counts = tuple(f"text {report.name}: {words}" for words in counted)
    tables = [ResultTable(table.title, table.columns, table.rows, notes=(*counts, *table.notes))]
    if any(row.kinds is not None for row in report.rows):
        tables.append(_kinds_table(report))
    return tables


def _kinds_table(report: TextReport) -> ResultTable:
    numbers = sorted({len(row.kinds.means) for row in report.rows if row.kinds is not None})
    precisions = in_precisions(row.dtype for row in report.rows)
    return ResultTable(
        f"Text {report.name}, average over its {' or '.join(map(str, numbers))} kinds, all with the same "
        f"weight{precisions} (± standard error over documents)",
        ("model", "bits per byte", "against target before", "kinds won", "against gold only", "kinds won"),
        tuple(
            (
                row.label,
                f"{row.kinds.average.mean:.4f}",
                difference(_average(row.kinds_against_before)),
                _kinds_won(row.kinds_against_before),
                difference(_average(row.kinds_against_gold_only)),
                _kinds_won(row.kinds_against_gold_only),
            )
            for row in report.rows
            if row.kinds is not None
        ),
    )


def _average(kinds: KindFigures | None) -> Estimate | None:
    return None if kinds is None else kinds.average


def _kinds_won(kinds: KindFigures | None) -> str:
    return "" if kinds is None else kinds.won
