"""``ptafuse sweep``: one configuration under many settings and several seeds, and one table of what they gave.

Every cell of the sweep is an ordinary configuration of the run directory, so cells share whatever stages agree on, and a
sweep that was killed goes on where it was. What was swept is recorded under ``sweeps/``, for the report.
"""

import itertools
import json
import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import Field, ValidationError, model_validator
from rich.console import Console

from pipeline.display.table import ResultTable
from pipeline.evaluation.eval_stage import run_eval
from pipeline.results import document_differences, untrained
from pipeline.run.outcomes import read_result
from pipeline.run.records import recorded_runs
from pipeline.run.session import Run, open_run
from pipeline.run.steps import FUSED, Request, Step
from pipeline.run.trained_model import discard_model
from pipeline.settings.load import ConfigError, load_config
from stages.contract.fingerprint import Settings
from stages.contract.store import Store
from stages.measures.standard_error import Estimate, weighted_mean

Scalar = bool | int | float | str


class Variant(Settings):
    """Settings that belong together; a list of values is tried one by one, several lists in every combination."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="Of its rows; values of lists are appended.")
    set: dict[str, Scalar | list[Scalar]] = Field({}, description="Dotted key -> a value, or values to try.")


class SweepConfig(Settings):
    """A sweep's TOML file."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="Begins the name of every configuration.")
    config: str = Field(description="The configuration that is varied: a TOML file, or the name of a shipped one.")
    seeds: tuple[int, ...] = Field((42,), min_length=1, description="train.seed of each repetition.")
    set: dict[str, Scalar] = Field({}, description="Dotted key -> value, of every variant.")
    baseline: str | None = Field(None, description="The variant that all others are compared with, seed by seed.")
    keep_models: bool = Field(False, description="Keep every trained model; else each is removed when it is evaluated.")
    variants: tuple[Variant, ...] = Field(min_length=1, description="What is compared.")

    @model_validator(mode="after")
    def _cells_differ(self) -> Self:
        names = [cell.name for cell in cells_of(self)]
        double = sorted({name for name in names if names.count(name) > 1})
        if double:
            raise ValueError(f"the names of cells must differ, but {double[0]!r} is there twice")
        if self.baseline is not None and self.baseline not in names:
            raise ValueError(f"baseline = {self.baseline!r} is none of the cells: {', '.join(names)}")
        return self


@dataclass(frozen=True)
class Cell:
    """One row of the table: a variant with one value of each list.

    Attributes:
        name: the variant's, with the values.
        overrides: ``("align.epsilon=0.2", ...)``, without seed and name.
    """

    name: str
    overrides: tuple[str, ...]


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


def load_sweep(path: Path) -> SweepConfig:
    """Read a sweep's TOML file, and check every cell's configuration.

    Raises:
        ConfigError: a file, key or value is wrong; names the cell.
    """
    try:
        sweep = SweepConfig.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"no such sweep: {path}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, problem['loc'])) or '(the file)'}: {problem['msg']}" for problem in error.errors()
        ]
        raise ConfigError("\n".join([f"{path}: {len(lines)} wrong setting(s)", *lines])) from None
    for cell in cells_of(sweep):
        try:
            load_config(sweep.config, cell.overrides)
        except ConfigError as error:
            raise ConfigError(f"{path}, cell {cell.name}: {error}") from None
    return sweep


def cells_of(sweep: SweepConfig) -> list[Cell]:
    """The rows of a sweep: every variant, its lists of values in every combination."""
    cells = []
    for variant in sweep.variants:
        settings = {**sweep.set, **variant.set}
        lists = {key: value for key, value in settings.items() if isinstance(value, list)}
        for values in itertools.product(*lists.values()):
            chosen = dict(zip(lists, values, strict=True))
            labels = [f"{key.rsplit('.', 1)[-1]}-{value}" for key, value in chosen.items()]
            overrides = tuple(f"{key}={json.dumps(value)}" for key, value in {**settings, **chosen}.items())
            cells.append(Cell("-".join([variant.name, *labels]).lower(), overrides))
    return cells


def run_sweep(
    sweep: SweepConfig, run_url: str, console: Console, *, local: bool, run_stages: Callable[[Run], None]
) -> None:
    """Compute every cell that has no figure yet; seed by seed, so that a table of all cells is there early.

    Args:
        sweep: what to run.
        run_url: the run directory.
        console: where progress is shown.
        local: compute in this process, without Ray.
        run_stages: runs every stage of a configuration.
    """
    store = Store(run_url)
    record = {**sweep.model_dump(mode="json"), "cells": {cell.name: list(cell.overrides) for cell in cells_of(sweep)}}
    store.replace(f"sweeps/{sweep.name}.json", (json.dumps(record, indent=1) + "\n").encode())
    for seed in sweep.seeds:
        for cell in cells_of(sweep):
            name = run_name(sweep.name, cell.name, seed)
            overrides = (*cell.overrides, f"name={name}", f"train.seed={seed}")
            run = open_run(Request(sweep.config, overrides), run_url, console, local=local)
            missing = [step.model for step in run.resolved.of_stage("eval") if read_result(store, step) is None]
            if not missing:
                console.print(f"{name}: nothing to do")
                continue
            if FUSED not in missing:  # baselines that are asked for since: they need no trained model
                console.rule(name, align="left")
                run_eval(run)
                continue
            console.rule(name, align="left")
            run_stages(run)
            if not sweep.keep_models:
                discard_model(run)
    console.print(f"sweep {sweep.name}: all {len(cells_of(sweep)) * len(sweep.seeds)} figures are there")


def run_name(sweep: str, cell: str, seed: int) -> str:
    """The configuration's name of one cell and seed."""
    return f"{sweep}-{cell}-seed{seed}"


def recorded_sweeps(store: Store) -> list[SweepConfig]:
    """The sweeps that were begun in a run directory."""
    found = []
    for name in sorted(store.names("sweeps")):
        record = json.loads(store.read(f"sweeps/{name}"))
        found.append(SweepConfig.model_validate({key: value for key, value in record.items() if key != "cells"}))
    return found


def sweep_results(sweep: SweepConfig, store: Store) -> list[CellResult]:
    """What the finished cells gave, in the sweep's order, then what they evaluated without training."""
    runs = {run.config.name: run for run in recorded_runs(store)}
    figures: dict[tuple[str, int], dict] = {}
    steps: dict[str, tuple[str, Step, bool]] = {}
    for cell, seed in itertools.product(cells_of(sweep), sweep.seeds):
        run = runs.get(run_name(sweep.name, cell.name, seed))
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
