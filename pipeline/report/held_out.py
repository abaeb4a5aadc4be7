"""Bits per byte on held-out text and on other texts, with paired differences: rows for the terminal and for the page."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.display.table import ResultTable
from pipeline.evaluation.gold_only import GoldOnly, find_gold_only, gold_training, is_gold_only
from pipeline.evaluation.paired import differences_by_kind, figures_by_kind, paired_difference
from pipeline.report.reported import runs_by_folder
from pipeline.run.outcomes import count_endings, evaluation_dtype, read_result, read_rounding
from pipeline.run.stage_table import FUSED, eval_key
from pipeline.run.steps import ResolvedRun, Step
from pipeline.settings.baselines import BASELINE_LABELS, ENSEMBLE, Baseline
from stages.contract.store import Store
from stages.measures.kinds import KindFigures
from stages.measures.standard_error import Estimate

_Result = dict[str, Any] | None
"""A model's figures, as ``read_result`` gives them."""


@dataclass(frozen=True)
class HeldOutRow:
    """Result of one model on the held-out text, or on another text.

    Attributes:
        label: display name of the model.
        bits_per_byte: over all documents; None if it was not evaluated.
        num_bytes: size of the text.
        against_before: difference to the target before training; None for the target itself and for sources.
        against_gold_only: difference to the same training on gold tokens only (``gold_only``); None without such a
            run, and for a run on the gold tokens.
        no_gold_only: reason why that difference is missing, and how to get it.
        refused: reason why a baseline is impossible with these models; None if it is possible.
        dtype: precision of the evaluation; None where there is none.
        surviving_share: share of the weights changed by training that keep a change in bfloat16; None where not recorded.
        kinds: bits per byte by kind of document; None where the documents have no kinds.
        kinds_against_before: difference to the target before training, by kind of document.
        kinds_against_gold_only: difference to the same training on gold tokens only, by kind of document.
        counts: documents of another text and their outcomes; None for the held-out text.
        endings: answers to held-out prompts that the model itself ended, and all of them; None where it was not asked.
    """

    label: str
    bits_per_byte: float | None
    num_bytes: int = 0
    against_before: Estimate | None = None
    against_gold_only: Estimate | None = None
    no_gold_only: str | None = None
    refused: str | None = None
    dtype: str | None = None
    surviving_share: float | None = None
    kinds: KindFigures | None = None
    kinds_against_before: KindFigures | None = None
    kinds_against_gold_only: KindFigures | None = None
    counts: Mapping[str, int] | None = None
    endings: tuple[int, int] | None = None


def held_out(
    runs: Sequence[ResolvedRun],
    store: Store,
    *,
    peers: Sequence[ResolvedRun] | None = None,
    text: str | None = None,
) -> list[HeldOutRow]:
    """Collect a row for every evaluated model: sources and target, baselines, then what each configuration trained.

    What is not evaluated has a row where the latest configuration of a name asks for it.

    Args:
        runs: the configurations that are shown, the last used one last.
        store: the run directory.
        peers: runs to search for one on gold tokens only; ``runs`` by default.
        text: figures on this text, which all of the ``runs`` name; on the held-out split by default.
    """
    read = _remembering(store)

    def gold_only(run: ResolvedRun) -> GoldOnly:
        return find_gold_only(run, runs if peers is None else peers, read, store.url, text)

    rows: list[HeldOutRow] = []
    for is_baseline in (False, True):
        for label, run, step in _untrained_once(runs, read, text):
            if is_baseline == (step.model in BASELINE_LABELS):
                row = _held_out_row(label, read(step))
                if is_baseline:
                    beside = [
                        other for other in runs if step.folder in {run_step.folder for run_step in other.steps.values()}
                    ]
                    row = _compared(row, read(step), read(_target_before(run, text)), _of_all(beside, gold_only, text))
                rows.append(row)
    fused_key = eval_key(FUSED, text)
    for run, label, is_latest in runs_by_folder(runs, fused_key):
        fused = read(run.steps[fused_key])
        if fused is None and not is_latest:
            continue
        row = _held_out_row(f"after {label} ({_describe(run, text)})", fused)
        reference = GoldOnly(None, None) if is_gold_only(run) else gold_only(run)
        if text is None:
            row = replace(row, surviving_share=_surviving_share(read_rounding(run.steps["train"], store)))
        rows.append(_compared(row, fused, read(_target_before(run, text)), reference))
    return rows


def _surviving_share(rounding: Mapping[str, int] | None) -> float | None:
    """Return the share of changed weights that keep a change in bfloat16."""
    if rounding is None or not rounding["num_changed"]:
        return None
    return rounding["num_surviving"] / rounding["num_changed"]


def _untrained_once(
    runs: Sequence[ResolvedRun], read: Callable[[Step], _Result], text: str | None
) -> list[tuple[str, ResolvedRun, Step]]:
    """List what the runs evaluate without training, each result once.

    For missing results, ask the latest run of each name.

    Returns:
        (label, the first run that has it, its step); two results of one label are distinguished by their runs.
    """
    latest = {run.config.name: run for run in runs}
    untrained_steps: dict[str, tuple[str, ResolvedRun, Step]] = {}
    for run in runs:
        for label, step in untrained(run, text):
            if run is latest[run.config.name] or read(step) is not None:
                untrained_steps.setdefault(step.folder, (label, run, step))
    labels = [label for label, _, _ in untrained_steps.values()]
    return [
        (label if labels.count(label) == 1 else f"{label}, {run.label}", run, step)
        for label, run, step in untrained_steps.values()
    ]


def _remembering(store: Store) -> Callable[[Step], _Result]:
    """Wrap ``read_result`` so that each file is read once, since many runs are compared with the same ones."""
    results: dict[str, _Result] = {}

    def read(step: Step) -> _Result:
        if step.folder not in results:
            results[step.folder] = read_result(store, step)
        return results[step.folder]

    return read


def _of_all(runs: Sequence[ResolvedRun], gold_only: Callable[[ResolvedRun], GoldOnly], text: str | None) -> GoldOnly:
    """Find the gold-only run to compare an untrained model with: the runs that evaluate the model must train alike."""
    first = gold_training(runs[0], text)
    if any(gold_training(run, text) != first for run in runs):
        return GoldOnly(
            None, "is evaluated by runs with different training, so there is no single run to compare it with"
        )
    return gold_only(runs[0])


def untrained(run: ResolvedRun, text: str | None = None) -> list[tuple[str, Step]]:
    """List what a run evaluates without training it, with labels for people: the sources, the target, the baselines.

    Args:
        run: which run.
        text: name of the text; None: the held-out split.
    """
    where = _unusual(run, text)
    labels = {model.name: f"source {model.name}{where}" for model in run.config.evaluated_sources}
    labels[run.config.target.name] = f"target {run.config.target.name} before{where}"
    for baseline in run.config.baselines.methods:
        labels[baseline] = f"{BASELINE_LABELS[baseline]} ({_describe_baseline(run, baseline, text)})"
    return [(label, run.steps[eval_key(name, text)]) for name, label in labels.items()]


def held_out_table(rows: Sequence[HeldOutRow], name: str = "Held-out text") -> ResultTable:
    """Build the table of the rows, for people; ``name`` is the name of the text."""
    has_endings = any(row.endings is not None for row in rows)
    return ResultTable(
        f"{name}{in_precisions(row.dtype for row in rows)} (differences: over all bytes ± standard error over "
        "documents)",
        (
            "model",
            "bits per byte",
            "against target before",
            "against gold only",
            "bytes",
            *(("answers that end",) if has_endings else ()),
        ),
        tuple((*_cells(row), *((_endings(row),) if has_endings else ())) for row in rows),
        notes=_notes(rows),
    )


def _cells(row: HeldOutRow) -> tuple[str, ...]:
    if row.refused:
        return (f"{row.label}; refused: {row.refused}", "refused", "", "", "")
    if row.bits_per_byte is None:
        return (row.label, "not evaluated", "", "", "")
    return (
        row.label,
        f"{row.bits_per_byte:.4f}",
        difference(row.against_before),
        difference(row.against_gold_only),
        f"{row.num_bytes:,}",
    )


def _endings(row: HeldOutRow) -> str:
    """Return how many answers the model itself ended, for people."""
    if row.endings is None:
        return ""
    num_ended, num_answers = row.endings
    return f"{num_ended} of {num_answers} ({num_ended / num_answers:.0%})" if num_answers else "no prompt"


def in_precisions(dtypes: Iterable[str | None]) -> str:
    """Return the precisions of evaluations for a title; empty without evaluations."""
    names = sorted({dtype for dtype in dtypes if dtype is not None})
    return f", evaluated in {' and '.join(names)}" if names else ""


def _notes(rows: Sequence[HeldOutRow]) -> tuple[str, ...]:
    """Explain why differences to training on gold tokens only are missing: each reason once, with its rows."""
    labels: dict[str, list[str]] = {}
    for row in rows:
        if row.no_gold_only is not None:
            labels.setdefault(row.no_gold_only, []).append(row.label)
    rounded = [
        f"{row.label}: {row.surviving_share:.0%} of the weights that training changed still differ after rounding to "
        "bfloat16"
        for row in rows
        if row.surviving_share is not None
    ]
    missing = [f"against gold only: {', '.join(names)} {reason}" for reason, names in labels.items()]
    return (*rounded, *missing)


def _held_out_row(label: str, result: _Result) -> HeldOutRow:
    if result is None:
        return HeldOutRow(label, None)
    if "refused" in result:
        return HeldOutRow(label, None, refused=result["refused"])
    return HeldOutRow(
        label,
        result["bits_per_byte"],
        result["num_bytes"],
        dtype=evaluation_dtype(result),
        kinds=figures_by_kind(result),
        counts=result.get("counts"),
        endings=count_endings(result),
    )


def _compared(row: HeldOutRow, result: _Result, before: _Result, gold_only: GoldOnly) -> HeldOutRow:
    """Add the differences to a row that has a result."""
    if result is None or row.bits_per_byte is None:
        return row
    against_before, against_gold_only = (
        None if baseline is None else paired_difference(result, baseline) for baseline in (before, gold_only.figures)
    )
    kinds_against_before, kinds_against_gold_only = (
        None if baseline is None else differences_by_kind(result, baseline) for baseline in (before, gold_only.figures)
    )
    return replace(
        row,
        against_before=against_before,
        against_gold_only=against_gold_only,
        no_gold_only=gold_only.missing,
        kinds_against_before=kinds_against_before,
        kinds_against_gold_only=kinds_against_gold_only,
    )


def _describe_baseline(run: ResolvedRun, baseline: Baseline, text: str | None) -> str:
    weights = run.config.baselines.source_weights(baseline, len(run.config.sources))
    sources = [f"{weight:.3g} {model.name}" for weight, model in zip(weights, run.config.sources, strict=True)]
    if baseline != ENSEMBLE:
        return " + ".join([f"{1 - sum(weights):.3g} {run.config.target.name}", *sources]) + _unusual(run, text)
    align, contexts = run.config.align, run.config.baselines.ensemble_contexts
    return f"{' + '.join(sources)}, {align.preset or align.marginals}, contexts by {contexts}{_unusual(run, text)}"


def _target_before(run: ResolvedRun, text: str | None) -> Step:
    """Return the step that evaluates the run's target before training.

    Its fingerprint covers the weights, the tokenizer, which documents are scored, and how, so two results are compared
    only if
    all of these agree.
    """
    return run.steps[eval_key(run.config.target.name, text)]


def _unusual(run: ResolvedRun, text: str | None) -> str:
    """Return what is unusual in how a run is evaluated: another split than validation, or rounded weights."""
    is_usual = text is not None or run.config.eval.split == "validation"
    split = "" if is_usual else f", {run.config.eval.split} split"
    return split if run.config.eval.dtype == "float32" else f"{split}, in {run.config.eval.dtype}"


def _describe(run: ResolvedRun, text: str | None) -> str:
    train, align, where = run.config.train, run.config.align, _unusual(run, text)
    if is_gold_only(run):
        return f"gold tokens only{where}"
    weight = f"{train.lambda_}" if train.lambda_end is None else f"{train.lambda_} to {train.lambda_end}"
    return f"lambda {weight}, {align.preset or align.pairing + ' ' + align.marginals}{where}"


def difference(estimate: Estimate | None) -> str:
    """Format a difference with its standard error; empty without a difference."""
    return "" if estimate is None else estimate.signed()
