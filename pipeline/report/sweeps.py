"""What the cells of a sweep gave, and its table."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.display.table import ResultTable
from pipeline.report.held_out import document_differences, untrained
from pipeline.run.outcomes import read_result
from pipeline.run.records import recorded_runs
from pipeline.run.stage_table import FUSED
from pipeline.run.steps import Step
from pipeline.workflow.sweep import SweepConfig, cells_of, run_name
from stages.contract.store import Store
from stages.measures.standard_error import Estimate, weighted_mean


@dataclass(frozen=True)
class CellResult:
    """What a cell's seeds gave on the held-out text.

    Attributes:
        name: the cell's.
        bits_per_byte: of each finished seed.
        against_baseline: mean over seeds of the paired difference, its standard error over documents; None for the
            baseline itself and without common seeds.
        seed_error: standard error of that difference over seeds; NaN for fewer than two.
        is_trained: it is a cell; else what its configurations evaluate without training, which has no seeds of its own.
    """

    name: str
    bits_per_byte: tuple[float, ...]
    against_baseline: Estimate | None
    seed_error: float = math.nan
    is_trained: bool = True


def sweep_results(sweep: SweepConfig, store: Store) -> list[CellResult]:
    """What the finished cells gave, in the sweep's order, then what they evaluated without training."""
    runs = {run.config.name: run for run in recorded_runs(store)}
    figures: dict[tuple[str, int], dict] = {}
    steps: dict[str, tuple[str, Step, bool]] = {}
    for cell, seed in itertools.product(cells_of(sweep), sweep.seeds):
        run = runs.get(run_name(sweep, cell, seed))
        if run is None:
            continue
        found = read_result(store, run.steps[f"eval/{FUSED}"])
        if found is not None:
            figures[cell.name, seed] = found
        own_tokens = {model.name for model in run.config.sources}
        steps |= {step.folder: (label, step, step.model not in own_tokens) for label, step in untrained(run)}
    cells = [_cell_result(sweep, cell.name, figures) for cell in cells_of(sweep)]
    others = [
        _untrained_result(sweep, label, read_result(store, step), figures if is_compared else {})
        for label, step, is_compared in steps.values()
    ]
    return [*cells, *(found for found in others if found is not None)]


def _untrained_result(
    sweep: SweepConfig, label: str, found: dict | None, figures: dict[tuple[str, int], dict]
) -> CellResult | None:
    """One figure beside those of all seeds.

    Args:
        sweep: the sweep.
        label: what was evaluated.
        found: its figures, None without.
        figures: of the cells; none for a source, whose first tokens, which are left out, are other ones.
    """
    if found is None:
        return None
    if "refused" in found:
        return CellResult(f"{label}; refused: {found['refused']}", (), None, is_trained=False)
    alone = CellResult(label, (found["bits_per_byte"],), None, is_trained=False)
    compared = _cell_result(sweep, label, {**figures, **{(label, seed): found for seed in sweep.seeds}})
    return replace(alone, against_baseline=compared.against_baseline, seed_error=compared.seed_error)


def _cell_result(sweep: SweepConfig, name: str, figures: dict[tuple[str, int], dict]) -> CellResult:
    own = {seed: figures[name, seed] for seed in sweep.seeds if (name, seed) in figures}
    values = tuple(found["bits_per_byte"] for found in own.values())
    common = [seed for seed in own if (sweep.baseline, seed) in figures] if sweep.baseline not in (None, name) else []
    if not common:
        return CellResult(name, values, None)
    pairs = [document_differences(own[seed], figures[str(sweep.baseline), seed]) for seed in common]
    differences = np.stack([difference for difference, _ in pairs])  # (seeds, documents)
    weights = pairs[0][1]
    by_seed = np.average(differences, axis=1, weights=weights)
    seed_error = float(by_seed.std(ddof=1) / math.sqrt(len(common))) if len(common) > 1 else math.nan
    return CellResult(name, values, weighted_mean(differences.mean(axis=0), weights), seed_error)


def cells_table(sweep: SweepConfig) -> ResultTable:
    """Return what a sweep will run: its cells and what they change."""
    cells = cells_of(sweep)
    return ResultTable(
        f"Sweep {sweep.name}: {len(cells)} cells of {sweep.config}, seeds {', '.join(map(str, sweep.seeds))}: "
        f"{len(cells) * len(sweep.seeds)} trainings",
        ("cell", "settings"),
        tuple((cell.name, ", ".join(cell.overrides)) for cell in cells),
        text_columns=(0, 1),
    )


def sweep_table(sweep: SweepConfig, results: Sequence[CellResult]) -> ResultTable:
    """The results for people."""
    rows = []
    for result in results:
        mean = f"{np.mean(result.bits_per_byte):.4f}" if result.bits_per_byte else "not evaluated"
        difference = "" if result.against_baseline is None else f"{result.against_baseline.mean:+.4f}"
        over_documents = "" if result.against_baseline is None else f"{result.against_baseline.error:.4f}"
        over_seeds = "" if math.isnan(result.seed_error) else f"{result.seed_error:.4f}"
        seeds = str(len(result.bits_per_byte)) if result.is_trained else ""
        rows.append((result.name, seeds, mean, difference, over_documents, over_seeds))
    return ResultTable(
        f"Sweep {sweep.name}: held-out bits per byte, mean over seeds; paired differences against {sweep.baseline}, with "
        "their standard errors over documents and over seeds",
        ("cell", "seeds", "bits per byte", "difference", "over documents", "over seeds"),
        tuple(rows),
    )
