"""``ptafuse sweep``: one configuration under many settings and several seeds, and one table of what they gave.

Every cell of the sweep is an ordinary configuration of the run directory, so cells share whatever stages agree on, and a
sweep that was killed resumes where it stopped. What was swept is recorded under ``sweeps/``, for the report.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator
from rich.console import Console

from pipeline.run.outcomes import read_result
from pipeline.run.records import recorded_configurations
from pipeline.run.session import open_run
from pipeline.run.stage_table import FUSED
from pipeline.run.steps import Request, ResolvedRun, record_key, result_key
from pipeline.run.trained_model import discard_model, is_trained
from pipeline.settings.documents import other_documents, scored_documents, scored_texts
from pipeline.settings.explain import describe_problems
from pipeline.settings.load import ConfigError, find_toml, load_config, read_toml, shipped_sweeps
from pipeline.settings.run import RunConfig
from pipeline.settings.texts import HELD_OUT
from pipeline.workflow.stages import run_all_stages
from stages.contract.fingerprint import Settings
from stages.contract.names import Name, refuse_same_folder
from stages.contract.store import Store

Scalar = bool | int | float | str


class SweepVariant(Settings):
    """Settings that belong together; a list of values is tried one by one, several lists in every combination."""

    name: Name = Field(description="Name of its rows; values of lists are appended.")
    set: dict[str, Scalar | list[Scalar]] = Field({}, description="Dotted key -> a value, or values to try.")


class SweepConfig(Settings):
    """A sweep's TOML file."""

    name: Name = Field(description="Prefix of the name of every configuration.")
    config: str = Field(description="Configuration to vary: a TOML file, or the name of a shipped one.")
    seeds: tuple[int, ...] = Field((42,), min_length=1, description="train.seed of each repetition.")
    name_seeds: bool = Field(
        True, description="Configurations are named <sweep>-<cell>-seed<seed>; false, with one seed: <sweep>-<cell>."
    )
    set: dict[str, Scalar] = Field({}, description="Dotted key -> value, of every variant.")
    baseline: str | None = Field(None, description="Variant with which all others are compared, seed by seed.")
    summary: str = Field(
        HELD_OUT, description=f"What the first table summarises: `{HELD_OUT}`, or the name of one of `[[eval.texts]]`."
    )
    average: Literal["bytes", "kinds"] = Field(
        "bytes",
        description="Average in the first table: over all bytes, or over the kinds of its documents, all with the "
        "same weight.",
    )
    keep_models: bool = Field(
        False, description="Keep every trained model; otherwise each is removed after its evaluation."
    )
    variants: tuple[SweepVariant, ...] = Field(min_length=1, description="What is compared.")

    @model_validator(mode="after")
    def _cells_differ(self) -> Self:
        names = [cell.name for cell in cells_of(self)]
        refuse_same_folder("names of cells", names)
        if not self.name_seeds and len(self.seeds) > 1:
            raise ValueError(f"name_seeds = false gives {len(self.seeds)} seeds of a cell the same name: give one seed")
        if self.baseline is not None and self.baseline not in names:
            raise ValueError(f"baseline = {self.baseline!r} is not one of the cells: {', '.join(names)}")
        if self.average == "kinds" and self.summary == HELD_OUT:
            raise ValueError(
                f"the documents of summary = {HELD_OUT!r} have no kinds: name one of the texts, or average bytes"
            )
        return self


@dataclass(frozen=True)
class Cell:
    """Row of a sweep's table: a variant with one value of each list.

    Attributes:
        name: the variant's, with the values.
        overrides: ``("align.epsilon=0.2", ...)``, without seed and name.
    """

    name: str
    overrides: tuple[str, ...]


def load_sweep(given: Path) -> SweepConfig:
    """Read a sweep's TOML file, and check every cell's configuration.

    Args:
        given: the file, or the name of a shipped sweep.

    Raises:
        ConfigError: a file, key or value is wrong; names the cell.
    """
    path = find_toml(given, shipped_sweeps(), "sweep")
    try:
        sweep = SweepConfig.model_validate(read_toml(path))
    except ValidationError as error:
        raise ConfigError(describe_problems(error, SweepConfig, str(path))) from None
    try:
        check_cells(sweep)
    except ConfigError as error:
        raise ConfigError(f"{path}, {error}") from None
    return sweep


def check_cells(sweep: SweepConfig) -> None:
    """Refuse a sweep of which a cell cannot be used, summed up, or compared with the baseline.

    Raises:
        ConfigError: a cell's configuration is wrong, it has no such text or kinds as the sweep is summed up by, or it scores
            other documents than the baseline; names the cell and the setting.
    """
    documents = {}
    for cell in cells_of(sweep):
        try:
            config = load_config(sweep.config, cell.overrides)
        except ConfigError as error:
            raise ConfigError(f"cell {cell.name}: {error}") from None
        _check_summary(sweep, cell, config)
        documents[cell.name] = {**scored_documents(config), "eval.texts": scored_texts(config)}
    for name, cell_documents in documents.items() if sweep.baseline is not None else ():
        differing = other_documents(cell_documents, documents[str(sweep.baseline)])
        if differing is not None:
            raise ConfigError(
                f"cell {name}: {differing}, in the baseline {sweep.baseline}: cells are compared with it document by "
                "document, so all must score the same documents. Give such settings under [set], or remove `baseline`"
            )


def _check_summary(sweep: SweepConfig, cell: Cell, config: RunConfig) -> None:
    texts = {text.name: text for text in config.eval.texts}
    if sweep.summary != HELD_OUT and sweep.summary not in texts:
        known = ", ".join([HELD_OUT, *texts])
        raise ConfigError(f"cell {cell.name}: summary = {sweep.summary!r} is not one of its texts; it has: {known}")
    if sweep.average == "kinds" and texts[sweep.summary].kind_column is None:
        raise ConfigError(
            f'cell {cell.name}: average = "kinds", and the text {sweep.summary} has no kind_column: set it there, or average '
            "bytes"
        )


def cells_of(sweep: SweepConfig) -> list[Cell]:
    """List the rows of a sweep: every variant, with its lists of values in every combination."""
    cells = []
    for variant in sweep.variants:
        settings = {**sweep.set, **variant.set}
        lists = {key: value for key, value in settings.items() if isinstance(value, list)}
        for values in itertools.product(*lists.values()):
            chosen = dict(zip(lists, values, strict=True))
            labels = [f"{key.rsplit('.', 1)[-1]}-{value}".lower() for key, value in chosen.items()]
            overrides = tuple(f"{key}={json.dumps(value)}" for key, value in {**settings, **chosen}.items())
            cells.append(Cell("-".join([variant.name, *labels]), overrides))
    return cells


def run_sweep(sweep: SweepConfig, run_url: str, console: Console, *, local: bool) -> None:
    """Compute every cell that has no figure yet; seed by seed, so that a table of all cells is there early.

    Args:
        sweep: sweep to run.
        run_url: the run directory.
        console: console for progress.
        local: compute in this process, without Ray.

    Raises:
        ConfigError: a cell cannot be used or compared; nothing has run then.
    """
    check_cells(sweep)
    store = Store(run_url)
    for name in store.names("sweeps"):
        other = name.removesuffix(".json")
        if other != sweep.name and other.casefold() == sweep.name.casefold():
            raise ConfigError(
                f"sweep {sweep.name!r}: {run_url} holds the sweep {other!r}, and their records are the same file on "
                "some disks: choose a name that differs in more than the case of letters"
            )
    _record(sweep, store)
    for seed in sweep.seeds:
        for cell in cells_of(sweep):
            name = run_name(sweep, cell, seed)
            run = open_run(_request(sweep, cell, seed), run_url, console, local=local)
            missing = [step.model for step in run.resolved.of_stage("eval") if read_result(store, step) is None]
            if not missing and not (sweep.keep_models and not is_trained(run)):
                console.print(f"{name}: nothing to do")
                continue
            if FUSED not in missing:  # baselines that are asked for since: they need no trained model
                from pipeline.engine.model_task import run_with_model
                from pipeline.evaluation.eval_stage import run_eval  # with torch, which reading a sweep does without

                console.rule(name, align="left")
                run_eval(run, run_with_model)
                continue
            console.rule(name, align="left")
            run_all_stages(run)
            if not sweep.keep_models:
                discard_model(run)
    console.print(f"sweep {sweep.name}: all {len(cells_of(sweep)) * len(sweep.seeds)} figures are there")


def run_name(sweep: SweepConfig, cell: Cell, seed: int) -> str:
    """Return the name of the configuration of one cell and seed."""
    return f"{sweep.name}-{cell.name}-seed{seed}" if sweep.name_seeds else f"{sweep.name}-{cell.name}"


def _request(sweep: SweepConfig, cell: Cell, seed: int) -> Request:
    """Build the request to compute one cell and seed."""
    name = run_name(sweep, cell, seed)
    return Request(sweep.config, (*cell.overrides, f"name={name}", f"train.seed={seed}"))


def _record_of(sweep: SweepConfig) -> str:
    return f"sweeps/{sweep.name}.json"


def _record(sweep: SweepConfig, store: Store) -> None:
    """Record the sweep, and the recorded configuration of each cell, which cannot be told from names."""
    requests = {
        run_name(sweep, cell, seed): _request(sweep, cell, seed) for cell in cells_of(sweep) for seed in sweep.seeds
    }
    value = {
        **sweep.model_dump(mode="json"),
        "cells": {cell.name: list(cell.overrides) for cell in cells_of(sweep)},
        "runs": {
            name: record_key(load_config(request.config_path, request.overrides)) for name, request in requests.items()
        },
    }
    store.replace(_record_of(sweep), (json.dumps(value, indent=1) + "\n").encode())


def sweep_runs(sweep: SweepConfig, store: Store) -> dict[tuple[str, int], ResolvedRun]:
    """Return the recorded configuration of each (cell, seed) that has run, whatever took its name since.

    A sweep that an earlier version recorded names no configurations. There a cell's is, of those of its name, one with a
    figure before one without, then one that was asked for as the sweep asks, then the latest.
    """
    recorded = recorded_configurations(store)
    try:
        known = json.loads(store.read(_record_of(sweep)))
    except FileNotFoundError:
        known = {}
    runs = {}
    for cell, seed in itertools.product(cells_of(sweep), sweep.seeds):
        name = run_name(sweep, cell, seed)
        is_known = known.get("cells", {}).get(cell.name) == list(cell.overrides) and name in known.get("runs", {})
        run = (
            recorded.get(known["runs"][name])
            if is_known
            else _likeliest(
                [run for run in recorded.values() if run.config.name == name], _request(sweep, cell, seed), store
            )
        )
        if run is not None:
            runs[cell.name, seed] = run
    return runs


def _likeliest(runs: list[ResolvedRun], request: Request, store: Store) -> ResolvedRun | None:
    def rank(index: int) -> tuple[bool, bool, int]:
        run = runs[index]
        return store.exists(result_key(run.steps[f"eval/{FUSED}"])), run.request == request, index

    return runs[max(range(len(runs)), key=rank)] if runs else None


def recorded_sweeps(store: Store) -> list[SweepConfig]:
    """Read the sweeps that were begun in a run directory."""
    sweeps = []
    for name in sorted(store.names("sweeps")):
        record = json.loads(store.read(f"sweeps/{name}"))
        sweeps.append(
            SweepConfig.model_validate({key: value for key, value in record.items() if key not in ("cells", "runs")})
        )
    return sweeps
