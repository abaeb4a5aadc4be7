"""From a configuration to the steps of a run: fingerprints, folders, and the frozen plan of shards."""

import json
import logging
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from pipeline.dataset.documents import ShardRange, dataset_identity, plan_documents
from pipeline.settings.baselines import ENSEMBLE, Baseline
from pipeline.settings.load import config_id
from pipeline.settings.run import RunConfig
from pipeline.stage_table import STAGES, StageSpec, step_key
from stages.align.config import VERSION as ALIGN_VERSION
from stages.contract.fingerprint import fingerprint
from stages.contract.manifest import sha256, stage_folder
from stages.contract.store import Store
from stages.models.config import ModelConfig

log = logging.getLogger(__name__)

TRAIN_VERSION = 2
EVAL_VERSION = 1
FUSED = "fused"
"""The trained model's name among the evaluated ones."""


@dataclass(frozen=True)
class Request:
    """A configuration as the user asked for it: the file, and what was changed on the command line."""

    config_path: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One folder of the run directory: a stage, and its model where the stage runs once a model.

    Attributes:
        key: ``"logits/gemma3"``.
        stage: ``"logits"``.
        model: ``"gemma3"``, or None.
        fingerprint: names the folder.
        inputs: input name, as the stage knows it -> step key.
        settings: the readable settings behind the fingerprint, with the inputs' fingerprints.
    """

    key: str
    stage: str
    model: str | None
    fingerprint: str
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """The step's folder in the run directory."""
        return stage_folder(self.key, self.fingerprint)


@dataclass(frozen=True)
class ResolvedRun:
    """A configuration with everything that names its results; recorded in the run directory for ``status``."""

    config: RunConfig
    steps: Mapping[str, Step]
    request: Request

    def command(self, stage: str, run_url: str) -> str:
        """What the user types to run a stage of this run."""
        sets = "".join(f" --set {shlex.quote(override)}" for override in self.request.overrides)
        arguments = f" ARGS={shlex.quote(sets.strip())}" if sets else ""
        path, run_url = shlex.quote(self.request.config_path), shlex.quote(run_url)
        return (
            f"`make {stage} CONFIG={path} RUN={run_url}{arguments}` (or `ptafuse {stage} {path} --run {run_url}{sets}`)"
        )

    def of_stage(self, stage: str) -> list[Step]:
        """The steps of one stage, in the order of the configuration's models."""
        return [step for step in self.steps.values() if step.stage == stage]

    @property
    def record_key(self) -> str:
        """Where the resolved configuration is recorded."""
        return f"configs/{self.config.name}-{config_id(self.config)}.json"


def resolve(config: RunConfig, store: Store, request: Request) -> ResolvedRun:
    """Name every result of a run. Hashes local models and datasets (remembered); loads none of them."""
    tokenizers = {model.name: model.tokenizer_identity() for model in config.models}
    stores = [store] if config.logits_from is None else [store, Store(config.logits_from)]
    steps: dict[str, Step] = {}
    for spec in STAGES:
        for model in spec.models(config) or (None,):
            step = (
                _shard_step(spec, config, tokenizers, stores)
                if spec.name == "shard"
                else _step(spec, config, model, steps)
            )
            steps[step.key] = step
    steps["train"] = _train_step(config, steps)
    for step in _eval_steps(config, steps):
        steps[step.key] = step
    return ResolvedRun(config, steps, request)


def _step(spec: StageSpec, config: RunConfig, model: ModelConfig | None, steps: Mapping[str, Step]) -> Step:
    inputs = dict(spec.inputs(config, model))
    settings = spec.settings(config, model)
    chained = {name: steps[key].fingerprint for name, key in inputs.items()}
    return Step(
        key=step_key(spec.name, model),
        stage=spec.name,
        model=model.name if model else None,
        fingerprint=fingerprint(spec.name, spec.version, settings, chained),
        inputs=inputs,
        settings={**settings, "inputs": chained, "version": spec.version},
    )


def _shard_step(spec: StageSpec, config: RunConfig, tokenizers: Mapping[str, str], stores: Sequence[Store]) -> Step:
    """Shards are cut to fit every tokenizer of the run, yet a source that is added later must not undo them.

    So a finished shard stage already in the run directory (or in that of ``logits_from``), of the same text and settings,
    is taken up if its segments fit all tokenizers of this run (a source was removed), or else all but some (one was added:
    its longer segments go through the model in windows, and the logits stage counts them). An unfinished one is not: its
    other shards would be cut for other tokenizers than its fingerprint names.
    """
    settings = spec.settings(config, None)
    dataset = dataset_identity(config.dataset)
    needed = sorted(set(tokenizers.values()))
    fitted = needed
    wanted = {"settings": settings, "dataset": dataset, "version": spec.version}
    found = [(store, name, have) for store in stores for name, have in _existing_shards(store, wanted)]
    own = _shard_fingerprint(spec, settings, dataset, needed)
    if own not in [name for _, name, _ in found]:
        fingerprints = {name: have for store, name, have in found if _is_complete(store, name)}
        target = tokenizers[config.target.name]
        wider = [have for have in fingerprints.values() if set(have) >= set(needed)]
        narrower = [have for have in fingerprints.values() if set(have) < set(needed) and target in have]
        if wider:
            fitted = min(wider, key=lambda have: (len(have), have))
        elif narrower:
            fitted = max(narrower, key=lambda have: (len(have), have))
            log.info(
                "segments stay as they were cut for %d of this run's %d tokenizers; segments that are too long for a "
                "model added since go through it in windows",
                len(fitted),
                len(needed),
            )
    return Step(
        key="shard",
        stage="shard",
        model=None,
        fingerprint=_shard_fingerprint(spec, settings, dataset, fitted),
        inputs={},
        settings={**settings, "inputs": {"dataset": dataset, "tokenizers": fitted}, "version": spec.version},
    )


def _existing_shards(store: Store, wanted: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Fingerprint and tokenizers of every planned shard stage of a run directory with these settings and this text."""
    headers = {name: _plan_header(store, stage_folder("shard", name)) for name in store.names("shard")}
    return [
        (name, header["tokenizers"])
        for name, header in headers.items()
        if header and all(header[key] == value for key, value in wanted.items())
    ]


def _is_complete(store: Store, shard_fingerprint: str) -> bool:
    folder = stage_folder("shard", shard_fingerprint)
    plan = read_plan(store, folder)
    return plan is not None and len(store.manifest_names(folder)) == plan.num_shards


def _shard_fingerprint(spec: StageSpec, settings: dict[str, Any], dataset: str, tokenizers: list[str]) -> str:
    return fingerprint(spec.name, spec.version, settings, {"dataset": dataset, "tokenizers": ",".join(tokenizers)})


def _train_step(config: RunConfig, steps: Mapping[str, Step]) -> Step:
    settings = {"train": config.train.result_settings(), "weights": config.target.weights_identity()}
    chained = {"fuse": steps["fuse"].fingerprint}
    print_ = fingerprint("train", TRAIN_VERSION, settings, chained)
    return Step("train", "train", None, print_, {"fuse": "fuse"}, {**settings, "inputs": chained})


def _eval_steps(config: RunConfig, steps: Mapping[str, Step]) -> list[Step]:
    """One step a model: the target before training, each source, the baselines, and the trained model ("fused")."""
    shared = {"eval": config.eval.result_settings()}
    shard = {"shard": steps["shard"].fingerprint}
    found: list[Step] = []

    def add(name: str, settings: dict[str, Any], chained: dict[str, str]) -> None:
        print_ = fingerprint("eval", EVAL_VERSION, settings, chained)
        found.append(Step(f"eval/{name}", "eval", name, print_, {"shard": "shard"}, {**settings, "inputs": chained}))

    models = [{"weights": model.weights_identity(), "tokenizer": model.tokenizer_identity()} for model in config.models]
    for model, identities in zip(config.models, models, strict=True):
        add(model.name, shared, {**shard, **identities})
    roles = ("target", *(f"source {number}" for number in range(1, len(models))))
    of_all = {
        f"{what} of {role}": identity
        for role, part in zip(roles, models, strict=True)
        for what, identity in part.items()
    }
    for baseline in config.baselines.methods:
        add(baseline, {**shared, **_baseline_settings(config, baseline)}, {**shard, **of_all})
    add(FUSED, shared, {**shard, "train": steps["train"].fingerprint})
    return found


def _baseline_settings(config: RunConfig, baseline: Baseline) -> dict[str, Any]:
    """What a baseline's figure depends on beside the models and the text."""
    settings: dict[str, Any] = {"baselines": config.baselines.baseline_settings(baseline, len(config.sources))}
    if baseline == ENSEMBLE:
        align = config.align.result_settings()
        settings["align"] = {name: align[name] for name in align if name not in ("pairing", "inexact")}
        settings["align version"] = ALIGN_VERSION
        settings["logits"] = {"top_k": config.logits.top_k, "top_p": config.logits.top_p}
    return settings


def result_key(step: Step) -> str:
    """Where the figure of an evaluated model is."""
    return f"{step.folder}/bits-per-byte.json"


# --- the frozen plan -------------------------------------------------------------------------------------------------


def plan_key(shard_folder: str) -> str:
    """``shard/<fp>/plan.jsonl``."""
    return f"{shard_folder}/plan.jsonl"


def freeze_plan(run: ResolvedRun, store: Store) -> "Plan":
    """The plan of a run's shards; made and frozen at the first call, read ever after."""
    step = run.steps["shard"]
    plan = read_plan(store, step.folder)
    if plan is not None:
        return plan
    inputs = step.settings["inputs"]
    header = {
        "settings": {key: value for key, value in step.settings.items() if key not in ("inputs", "version")},
        "version": step.settings["version"],
        "dataset": inputs["dataset"],
        "tokenizers": inputs["tokenizers"],
    }
    ranges = plan_documents(run.config.dataset, run.config.shard.documents_per_shard)
    lines = [json.dumps(header, sort_keys=True), *(json.dumps(part.to_json(), sort_keys=True) for part in ranges)]
    store.create(plan_key(step.folder), ("\n".join(lines) + "\n").encode())  # another driver's plan is as good as ours
    plan = read_plan(store, step.folder)
    assert plan is not None
    return plan


@dataclass(frozen=True)
class Plan:
    """The frozen plan: shard number -> its fixed range of documents."""

    ranges: tuple[ShardRange, ...]
    sha256: str

    @property
    def num_shards(self) -> int:
        """Shards of every sharded stage of the run."""
        return len(self.ranges)


def read_plan(store: Store, shard_folder: str) -> Plan | None:
    """The frozen plan, None before the shard stage first ran."""
    try:
        raw = store.read(plan_key(shard_folder))
    except FileNotFoundError:
        return None
    lines = raw.decode().splitlines()[1:]
    return Plan(tuple(ShardRange.from_json(json.loads(line)) for line in lines), sha256(raw))


def _plan_header(store: Store, shard_folder: str) -> dict[str, Any] | None:
    try:
        raw = store.read(plan_key(shard_folder))
    except FileNotFoundError:
        return None
    return json.loads(raw.split(b"\n", 1)[0])


# --- the record of a resolved configuration -----------------------------------------------------------------------------


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
    """All recorded configurations by their keys, the last used one last."""
    keys = [f"configs/{file}" for file in store.names("configs") if file.endswith(".json")]
    records = {key: json.loads(raw) for key, raw in store.read_all(keys)}
    return dict(sorted(records.items(), key=lambda item: item[1]["used_at_ns"]))


def recorded_steps(store: Store) -> list[tuple[str, Step]]:
    """The steps of every configuration that ever ran here, with its name, the last used one last."""
    records = _records(store).values()
    return [(value["config"]["name"], Step(**step)) for value in records for step in value["steps"].values()]


def recorded_runs(store: Store) -> list[ResolvedRun]:
    """The configurations that ran here, one a name (its latest), the last used one last."""
    records = _records(store)
    latest: dict[str, str] = {}
    for key, value in records.items():
        latest.pop(value["config"]["name"], None)
        latest[value["config"]["name"]] = key
    return [_from_record(records[key], f"{store.url}/{key}") for key in latest.values()]


def recorded_run(store: Store, name: str | None = None) -> ResolvedRun:
    """The configuration that ran here last, or the one of that name.

    Raises:
        ValueError: nothing (of that name) was ever run here.
    """
    runs = [run for run in recorded_runs(store) if name in (None, run.config.name)]
    if not runs:
        which = "no configuration" if name is None else f"no configuration named {name!r}"
        raise ValueError(f"{store.url}: {which} has run here; start with `make shard RUN={store.url}`")
    return runs[-1]


def _from_record(value: dict[str, Any], where: str) -> ResolvedRun:
    try:
        steps = {key: Step(**step) for key, step in value["steps"].items()}
        config = RunConfig.model_validate(value["config"])
    except (TypeError, ValidationError) as error:
        raise ValueError(
            f"{where} was recorded by another version of ptafuse: run a stage of its configuration again with this one, or go "
            f"on with that version ({str(error).splitlines()[0]})"
        ) from None
    return ResolvedRun(config, steps, Request(value["config_path"], tuple(value["overrides"])))
