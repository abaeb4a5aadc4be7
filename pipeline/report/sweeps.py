"""Results of a sweep's cells, and their table."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.display.table import ResultTable
from pipeline.evaluation.paired import document_differences, document_kinds, figures_by_kind
from pipeline.report.held_out import in_precisions, untrained
from pipeline.run.outcomes import evaluation_dtype, read_result
from pipeline.run.stage_table import FUSED, eval_key
from pipeline.run.steps import ResolvedRun, Step
from pipeline.settings.documents import PLACE, other_documents, scored_documents
from pipeline.settings.texts import HELD_OUT
from pipeline.workflow.sweep import SweepConfig, cells_of, sweep_runs
from stages.contract.store import Store
from stages.measures.kinds import kind_figures
from stages.measures.standard_error import Estimate, weighted_mean


@dataclass(frozen=True)
class Measure:
    """Figure that a table of a sweep summarises.

    Attributes:
        text: the text; None for the held-out split.
        by_kind: averaged over kinds of documents, all with the same weight; else over all bytes.
    """

    text: str | None = None
    by_kind: bool = False

    @property
    def words(self) -> str:
        """Description for the title of a table."""
        where = "held-out bits per byte" if self.text is None else f"bits per byte on the text {self.text}"
        return f"{where}, average over kinds" if self.by_kind else where


def summary_of(sweep: SweepConfig) -> Measure:
    """Return the measure of the sweep's first table."""
    return Measure(None if sweep.summary == HELD_OUT else sweep.summary, sweep.average == "kinds")


def sweep_measures(sweep: SweepConfig, runs: Iterable[ResolvedRun]) -> list[Measure]:
    """Return all that the sweep's runs can be summed up by: the sweep's summary, then the held-out split and every text."""
    texts = {text.name: text for run in runs for text in run.config.eval.texts}
    measures = [summary_of(sweep), Measure()]
    for name, text in texts.items():
        measures += [Measure(name), *([Measure(name, by_kind=True)] if text.kind_column is not None else [])]
    return list(dict.fromkeys(measures))


@dataclass(frozen=True)
class CellResult:
    """Result of a cell's seeds on a text.

    Attributes:
        name: the cell's.
        bits_per_byte: bits per byte of each finished seed.
        against_baseline: mean over seeds of the paired difference, its standard error over documents; None for the
            baseline itself, without common seeds, and where other documents were scored.
        not_compared: reason why there are figures on both sides but no difference.
        seed_error: standard error of that difference over seeds; None for fewer than two.
        is_trained: whether it is a cell; False: a model that is evaluated without training, which has no seeds.
        dtypes: the precisions of the evaluations.
        kinds_won: kinds of documents on which the mean over seeds is better than the baseline's, "15 of 18"; empty where
            nothing is compared by kind.
    """

    name: str
    bits_per_byte: tuple[float, ...]
    against_baseline: Estimate | None
    seed_error: float | None = None
    is_trained: bool = True
    not_compared: str | None = None
    dtypes: frozenset[str] = frozenset()
    kinds_won: str = ""


@dataclass(frozen=True)
class _Figures:
    """Evaluation, with what determines its documents."""

    result: dict[str, Any]
    documents: Mapping[str, Any]

    def value(self, measure: Measure) -> float:
        """Return the value of the measure; NaN for an average over kinds if the documents have none."""
        if not measure.by_kind:
            return float(self.result["bits_per_byte"])
        kinds = figures_by_kind(self.result)
        return math.nan if kinds is None else kinds.average.mean


def sweep_results(
    sweep: SweepConfig,
    store: Store,
    measure: Measure | None = None,
    runs: Mapping[tuple[str, int], ResolvedRun] | None = None,
) -> list[CellResult]:
    """Collect the results of finished cells, in the sweep's order, then of what they evaluated without training.

    Args:
        sweep: the sweep.
        store: the run directory.
        measure: quantity to summarise; by default the one that the sweep names.
        runs: the configuration of each cell and seed, as ``sweep_runs`` gives them; read by default.
    """
    measure = summary_of(sweep) if measure is None else measure
    text = measure.text
    runs = sweep_runs(sweep, store) if runs is None else runs
    figures: dict[tuple[str, int], _Figures] = {}
    steps: dict[str, tuple[str, Step, Mapping[str, Any], bool]] = {}
    for cell, seed in itertools.product(cells_of(sweep), sweep.seeds):
        run = runs.get((cell.name, seed))
        if run is None or eval_key(FUSED, text) not in run.steps:
            continue
        result = read_result(store, run.steps[eval_key(FUSED, text)])
        if result is not None:
            figures[cell.name, seed] = _Figures(result, _documents(run, text))
        own_tokens = {model.name for model in run.config.sources}
        steps |= {
            step.folder: (label, step, _documents(run, text), step.model not in own_tokens)
            for label, step in untrained(run, text)
        }
    cells = [
        replace(_cell_result(sweep, cell.name, figures, measure), dtypes=_dtypes(figures, cell.name))
        for cell in cells_of(sweep)
    ]
    others = [
        _untrained_result(sweep, label, _Figures(result, documents), figures if is_compared else {}, measure)
        for label, step, documents, is_compared in steps.values()
        if (result := read_result(store, step)) is not None
    ]
    return [*cells, *others]


def _documents(run: ResolvedRun, text: str | None) -> dict[str, Any]:
    """Return what determines which documents a run scores: settings, and the contents of the dataset.

    Documents that training has read are left out of a text, so everything that determines those counts as well.
    """
    settings = {key: value for key, value in scored_documents(run.config).items() if key not in PLACE}
    documents = {"dataset": run.steps["shard"].settings["inputs"]["dataset"], **settings}
    if text is None:
        return documents
    step = run.steps[eval_key(FUSED, text)]
    of_text = {**step.settings["text"], "documents": step.settings["inputs"]["documents"]}
    held_out_only = ("eval.split", "eval.max_documents")
    return {
        **{key: value for key, value in documents.items() if key not in held_out_only},
        **{f"eval.texts.{text}.{key}": value for key, value in of_text.items()},
    }


def _untrained_result(
    sweep: SweepConfig,
    label: str,
    untrained: _Figures,
    figures: Mapping[tuple[str, int], _Figures],
    measure: Measure,
) -> CellResult:
    """Compare one untrained result with the results of all seeds.

    Args:
        sweep: the sweep.
        label: name of the evaluated model.
        untrained: its figures.
        figures: results of the cells; none for a source, which leaves out other first tokens.
        measure: summarised quantity.
    """
    if "refused" in untrained.result:
        return CellResult(f"{label}; refused: {untrained.result['refused']}", (), None, is_trained=False)
    of_seeds = {(label, seed): untrained for seed in sweep.seeds}
    compared = _cell_result(sweep, label, {**figures, **of_seeds}, measure)
    return replace(compared, bits_per_byte=(untrained.value(measure),), is_trained=False)


def _cell_result(
    sweep: SweepConfig, name: str, figures: Mapping[tuple[str, int], _Figures], measure: Measure
) -> CellResult:
    of_cell = {seed: figures[name, seed] for seed in sweep.seeds if (name, seed) in figures}
    values = tuple(seed_figures.value(measure) for seed_figures in of_cell.values())
    baseline = sweep.baseline
    if baseline is None or baseline == name:
        return CellResult(name, values, None)
    pairs = [(of_cell[seed], figures[baseline, seed]) for seed in of_cell if (baseline, seed) in figures]
    if not pairs:
        return CellResult(name, values, None)
    refused = _other_documents(pairs)
    if refused is not None:
        return CellResult(name, values, None, not_compared=refused)
    paired = [document_differences(cell.result, other.result, same_documents=True) for cell, other in pairs]
    differences = np.stack([difference for difference, _ in paired])  # (seeds, documents)
    weights = paired[0][1]
    kinds = document_kinds(pairs[0][0].result, pairs[0][1].result, same_documents=True) if measure.by_kind else None
    won = ""
    if kinds is None:
        if measure.by_kind:
            return CellResult(name, values, None, not_compared="its documents have no kind")
        by_seed = np.average(differences, axis=1, weights=weights)
        estimate = weighted_mean(differences.mean(axis=0), weights)
    else:
        by_seed = np.array([kind_figures(difference, weights, kinds).average.mean for difference in differences])
        by_kind = kind_figures(differences.mean(axis=0), weights, kinds)
        estimate, won = by_kind.average, by_kind.won
    seed_error = float(by_seed.std(ddof=1) / math.sqrt(len(pairs))) if len(pairs) > 1 else None
    return CellResult(name, values, estimate, seed_error, kinds_won=won)


def _other_documents(pairs: Sequence[tuple[_Figures, _Figures]]) -> str | None:
    """Explain why these seeds and the baseline do not score the same documents; None if they do."""
    first = pairs[0][1]
    for seed_figures in itertools.chain.from_iterable(pairs):
        differing = other_documents(seed_figures.documents, first.documents)
        if differing is not None:
            return f"{differing}, so different documents are scored"
    scored = {frozenset(_ids(cell) & _ids(other)) for cell, other in pairs}
    if len(scored) > 1:
        return "its seeds have results on different documents"
    return None if any(scored) else "no document has results of both"


def _ids(figures: _Figures) -> set[int]:
    return {document["doc_id"] for document in figures.result["documents"]}


def cells_table(sweep: SweepConfig) -> ResultTable:
    """Describe what a sweep will run: its cells and their settings."""
    cells = cells_of(sweep)
    return ResultTable(
        f"Sweep {sweep.name}: {len(cells)} cells of {sweep.config}, seeds {', '.join(map(str, sweep.seeds))}: "
        f"{len(cells) * len(sweep.seeds)} trainings",
        ("cell", "settings"),
        tuple((cell.name, ", ".join(cell.overrides)) for cell in cells),
        text_columns=(0, 1),
    )


def sweep_tables(sweep: SweepConfig, store: Store) -> list[ResultTable]:
    """Build a sweep's tables: first the one of its measure, then the held-out split and every text."""
    runs = sweep_runs(sweep, store)
    return [
        sweep_table(sweep, sweep_results(sweep, store, measure, runs), measure)
        for measure in sweep_measures(sweep, runs.values())
    ]


def sweep_table(sweep: SweepConfig, results: Sequence[CellResult], measure: Measure | None = None) -> ResultTable:
    """Build the table of the results, for people.

    Args:
        sweep: the sweep.
        results: results from ``sweep_results``.
        measure: quantity to summarise; by default the one that the sweep names.
    """
    measure = summary_of(sweep) if measure is None else measure
    rows = []
    for result in results:
        mean = f"{np.mean(result.bits_per_byte):.4f}" if result.bits_per_byte else "not evaluated"
        difference = "" if result.against_baseline is None else f"{result.against_baseline.mean:+.4f}"
        difference = difference if result.not_compared is None else "other documents"
        error = math.nan if result.against_baseline is None else result.against_baseline.error
        over_documents = "" if math.isnan(error) else f"{error:.4f}"
        over_seeds = "" if result.seed_error is None else f"{result.seed_error:.4f}"
        seeds = str(len(result.bits_per_byte)) if result.is_trained else ""
        cells = (result.name, seeds, mean, difference, over_documents, over_seeds)
        rows.append((*cells, result.kinds_won) if measure.by_kind else cells)
    columns = ("cell", "seeds", "bits per byte", "difference", "over documents", "over seeds")
    return ResultTable(
        f"Sweep {sweep.name}: {measure.words}{_precisions(results)}, mean over seeds; paired "
        f"differences against {sweep.baseline}, with their standard errors over documents and over seeds",
        (*columns, "kinds won") if measure.by_kind else columns,
        tuple(rows),
        notes=tuple(
            f"{result.name} is not compared with {sweep.baseline}: {result.not_compared}"
            for result in results
            if result.not_compared is not None
        ),
    )


def _precisions(results: Sequence[CellResult]) -> str:
    return in_precisions(dtype for result in results for dtype in result.dtypes)


def _dtypes(figures: Mapping[tuple[str, int], _Figures], name: str) -> frozenset[str]:
    return frozenset(
        evaluation_dtype(seed_figures.result) for (cell, _), seed_figures in figures.items() if cell == name
    )
