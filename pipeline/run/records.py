"""Records of the configurations that ran in a run directory."""

import json
import logging
import time
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from pipeline.run.steps import Request, ResolvedRun, Step
from pipeline.settings.run import RunConfig
from stages.contract.store import Store

log = logging.getLogger(__name__)


def record(run: ResolvedRun, store: Store) -> None:
    """Write the resolved configuration into the run directory, for ``status`` and for people."""
    value = {
        "used_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "used_at_ns": time.time_ns(),
        "config_path": run.request.config_path,
        "overrides": list(run.request.overrides),
        "config": run.config.model_dump(mode="json", by_alias=True),
        "steps": {key: asdict(step) for key, step in run.steps.items()},
    }
    store.replace(run.record_key, (json.dumps(value, indent=1) + "\n").encode())


def _records(store: Store) -> dict[str, dict[str, Any]]:
    """Read all recorded configurations by their keys, the last used one last."""
    keys = [f"configs/{file}" for file in store.names("configs") if file.endswith(".json")]
    records = {key: json.loads(raw) for key, raw in store.read_all(keys)}
    return dict(sorted(records.items(), key=lambda item: item[1]["used_at_ns"]))


def recorded_steps(store: Store) -> list[tuple[str, Step]]:
    """List the steps of every configuration that ever ran here, with its name, the last used one last."""
    records = _records(store).values()
    return [(value["config"]["name"], Step(**step)) for value in records for step in value["steps"].values()]


def recorded_configurations(store: Store) -> dict[str, ResolvedRun]:
    """Read every configuration that ever ran here, by the key of its record, the last used one last.

    A record of another version that this one cannot read is left out, and logged.

    Raises:
        ValueError: the latest record of a name cannot be read.
    """
    records = _records(store)
    latest = {value["config"]["name"]: key for key, value in records.items()}
    configurations = {}
    for key, value in records.items():
        try:
            configurations[key] = _from_record(value, f"{store.url}/{key}")
        except ValueError as error:
            if key == latest[value["config"]["name"]]:
                raise
            log.warning("left out: %s", error)
    return configurations


def recorded_runs(store: Store) -> list[ResolvedRun]:
    """Read the latest configuration of each name that ran here, the last used one last."""
    records = _records(store)
    latest: dict[str, str] = {}
    for key, value in records.items():
        latest.pop(value["config"]["name"], None)
        latest[value["config"]["name"]] = key
    return [_from_record(records[key], f"{store.url}/{key}") for key in latest.values()]


def recorded_run(store: Store, name: str | None = None) -> ResolvedRun:
    """Read the configuration that ran here last, or the one of the given name.

    Raises:
        ValueError: nothing (of that name) was ever run here.
    """
    runs = [run for run in recorded_runs(store) if name in (None, run.config.name)]
    if not runs:
        which = "no configuration" if name is None else f"no configuration named {name!r}"
        raise ValueError(f"{store.url}: {which} has been run here; start with `make shard RUN={store.url}`")
    return runs[-1]


def _from_record(value: dict[str, Any], where: str) -> ResolvedRun:
    try:
        steps = {key: Step(**step) for key, step in value["steps"].items()}
        config = RunConfig.model_validate(_upgraded(value["config"]))
    except (TypeError, ValidationError) as error:
        raise ValueError(
            f"{where} was recorded by another version of ptafuse: run a stage of its configuration again with this "
            f"one, or continue with that version ({str(error).splitlines()[0]})"
        ) from None
    return ResolvedRun(config, steps, Request(value["config_path"], tuple(value["overrides"])))


def _upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded configuration as this version would have recorded it.

    Before `documents` was recorded, a split that was not given was recorded as "train", and with a path it was not read.
    `fuse.per` could be given without fitted weights, and was not read.
    """

    def without_split(dataset: dict[str, Any]) -> dict[str, Any]:
        is_old = "documents" not in dataset and dataset.get("hub") is None
        return {**dataset, "split": None} if is_old else dataset

    if not isinstance(config.get("dataset"), dict):
        return config
    upgraded = {**config, "dataset": without_split(config["dataset"])}
    fuse = config.get("fuse")
    if isinstance(fuse, dict) and fuse.get("function") != "fitted":
        upgraded["fuse"] = {name: value for name, value in fuse.items() if name != "per"}
    evaluation = config.get("eval")
    if isinstance(evaluation, dict) and evaluation.get("texts"):
        upgraded["eval"] = {**evaluation, "texts": [without_split(text) for text in evaluation["texts"]]}
    return upgraded
