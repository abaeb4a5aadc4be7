"""Resolve a configuration to the steps of a run: fingerprints and folders."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.dataset.documents import dataset_identity
from pipeline.run.shard_plan import plan_header, read_plan
from pipeline.run.specs import ShardedStage, StageSpec
from pipeline.run.stage_table import STAGES, model_and_text, step_key
from pipeline.run.steps import Request, ResolvedRun, Step
from pipeline.settings.run import RunConfig
from stages.contract.fingerprint import fingerprint
from stages.contract.manifest import stage_folder
from stages.contract.store import Store

log = logging.getLogger(__name__)


def resolve(config: RunConfig, store: Store, request: Request) -> ResolvedRun:
    """Name every result of a run. Hashes local models and datasets (remembered); loads none of them."""
    stores = [store] if config.logits_from is None else [store, Store(config.logits_from)]
    steps: dict[str, Step] = {}
    for spec in STAGES:
        if not spec.applies(config):
            continue
        for name in spec.names(config) if spec.names else (None,):
            step = (
                _document_step(spec, config, stores)
                if isinstance(spec, ShardedStage) and spec.reads_documents
                else _step(spec, config, name, steps)
            )
            steps[step.key] = step
    return ResolvedRun(config, steps, request)


def _step(spec: StageSpec, config: RunConfig, name: str | None, steps: Mapping[str, Step]) -> Step:
    inputs = dict(spec.inputs(config, name))
    settings = spec.settings(config, name)
    chained = {**{of: steps[key].fingerprint for of, key in inputs.items()}, **spec.identities(config, name)}
    model, text = model_and_text(name)
    return Step(
        key=step_key(spec.name, name),
        stage=spec.name,
        model=model,
        fingerprint=fingerprint(spec.name, spec.version, settings, chained),
        inputs=inputs,
        settings={**settings, "inputs": chained, "version": spec.version},
        text=text,
    )


def _document_step(spec: ShardedStage, config: RunConfig, stores: Sequence[Store]) -> Step:
    """Resolve the shard step so that a source that is added later does not invalidate finished shards.

    Shards are cut to fit every tokenizer of the run. A finished shard stage of the same text and settings, in the run
    directory or in that of ``logits_from``, is reused if its segments fit all tokenizers of this run (a source was removed),
    or else all but some (one was added: its longer segments go through the model in windows, and the logits stage counts
    them). An unfinished one is not reused: its other shards would be cut for other tokenizers than its fingerprint names.
    """
    tokenizers = {model.name: model.tokenizer_identity() for model in config.models}
    settings = spec.settings(config, None)
    dataset = dataset_identity(config.dataset)
    needed = sorted(set(tokenizers.values()))
    fitted = needed
    wanted = {"settings": settings, "dataset": dataset, "version": spec.version}
    existing = [(store, name, have) for store in stores for name, have in _existing_shards(store, wanted)]
    fingerprint = _shard_fingerprint(spec, settings, dataset, needed)
    if fingerprint not in [name for _, name, _ in existing]:
        fingerprints = {name: have for store, name, have in existing if _is_complete(store, name)}
        target = tokenizers[config.target.name]
        wider = [have for have in fingerprints.values() if set(have) >= set(needed)]
        narrower = [have for have in fingerprints.values() if set(have) < set(needed) and target in have]
        if wider:
            fitted = min(wider, key=lambda have: (len(have), have))
        elif narrower:
            fitted = max(narrower, key=lambda have: (len(have), have))
            log.info(
                "keeping the segments that were cut for %d of this run's %d tokenizers; segments that are too long "
                "for a model added since are processed in windows",
                len(fitted),
                len(needed),
            )
    return Step(
        key=step_key(spec.name, None),
        stage=spec.name,
        model=None,
        fingerprint=_shard_fingerprint(spec, settings, dataset, fitted),
        inputs={},
        settings={**settings, "inputs": {"dataset": dataset, "tokenizers": fitted}, "version": spec.version},
    )


def _existing_shards(store: Store, wanted: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """List fingerprint and tokenizers of the planned shard stages with these settings and this text."""
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
