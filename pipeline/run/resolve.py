"""From a configuration to the steps of a run: fingerprints, folders, and the frozen plan of shards."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.dataset.documents import dataset_identity
from pipeline.run.shard_plan import plan_header, read_plan
from pipeline.run.stage_table import STAGES, StageSpec, step_key
from pipeline.run.steps import FUSED, Request, ResolvedRun, Step
from pipeline.settings.baselines import ENSEMBLE, Baseline
from pipeline.settings.run import RunConfig
from stages.align.config import VERSION as ALIGN_VERSION
from stages.contract.fingerprint import fingerprint
from stages.contract.manifest import stage_folder
from stages.contract.store import Store
from stages.models.config import ModelConfig

log = logging.getLogger(__name__)

TRAIN_VERSION = 2
EVAL_VERSION = 1


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
    headers = {name: plan_header(store, stage_folder("shard", name)) for name in store.names("shard")}
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
