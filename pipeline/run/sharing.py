"""``logits_from``: import the finished shards of another run directory instead of computing them again.

A shard that is done there, under the same fingerprint and from the same rows, gets a manifest here that names the file
there. Only manifests (and the frozen plan) are copied, and nothing is written there; a reader of the shard opens the file
there and checks its hash. Shards that are not done there are computed here. A source that was adapted there is copied
(``trained_model.import_model``): logits name the model that gave them, and shards that are missing need it.
"""

import logging
from dataclasses import dataclass

from pipeline.run.shard_plan import plan_key
from pipeline.run.steps import Step
from pipeline.settings.run import RunConfig
from stages.contract.digest import sha256
from stages.contract.manifest import DataFile, InputRef, Manifest, manifest_key, stage_folder
from stages.contract.store import Store
from train.job import MANIFEST

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImportedShards:
    """Outcome of importing a step's pending shards.

    Attributes:
        shards: shards that have a manifest here now.
        other_rows: shards that are done there, but from a different shard file or adapted model than ours, so they cannot be
            used.
    """

    shards: tuple[int, ...]
    other_rows: tuple[int, ...]


def shared_store(config: RunConfig) -> Store | None:
    """Return the run directory of ``logits_from``, if there is one."""
    return None if config.logits_from is None else Store(config.logits_from)


def check_shared(url: str) -> None:
    """Refuse a ``logits_from`` that is not a run directory.

    Raises:
        FileNotFoundError: there are no logits; says what to do.
    """
    if not Store(url).names("logits"):
        raise FileNotFoundError(
            f"logits_from = {url!r} holds no logits (expected {url}/logits/<model>/<fingerprint>): run `make logits "
            f"RUN={url}` there, or remove logits_from to compute them here"
        )


def import_plan(step: Step, store: Store, other: Store) -> bool:
    """Copy the frozen plan of the same shard fingerprint from the other run directory, if there is one."""
    try:
        raw = other.read(plan_key(step.folder))
    except FileNotFoundError:
        return False
    return store.create(plan_key(step.folder), raw)


def import_shards(step: Step, store: Store, other: Store, pending: list[int], num_shards: int) -> ImportedShards:
    """Publish manifests for the shards of a step that are done in another run directory.

    Args:
        step: a step of a stage that can be shared.
        store: this run directory.
        other: run directory to import from.
        pending: shards without a manifest here.
        num_shards: shards of the run.

    Raises:
        ValueError: a manifest there is of another plan.
    """
    folder = _folder_there(step, other)
    manifests = {} if folder is None else other.manifests(folder)
    taken, other_rows = [], []
    for shard in pending:
        manifest = manifests.get(shard)
        if manifest is None:
            continue
        if (manifest.fingerprint, manifest.num_shards) != (step.fingerprint, num_shards):
            raise ValueError(
                f"{other.url}/{folder}: shard {shard} is of {manifest.num_shards} shards, fingerprint "
                f"{manifest.fingerprint}; expected {num_shards}, {step.fingerprint}: remove logits_from, or repair "
                "that run with `ptafuse verify`"
            )
        inputs = _inputs_here(manifest, step, store)
        if inputs is None:
            other_rows.append(shard)
            continue
        files = {"data": _at(manifest.data, other), "quarantine": _at(manifest.quarantine, other)}
        moved = manifest.model_copy(update={"stage": step.key, "inputs": inputs, **files})
        store.create(manifest_key(step.folder, shard), moved.to_bytes())
        taken.append(shard)
    return ImportedShards(tuple(taken), tuple(other_rows))


def _folder_there(step: Step, other: Store) -> str | None:
    """Find the step's folder in the other run directory, where models may have other names."""
    if step.model is None:
        return step.folder
    keys = [f"{step.stage}/{name}" for name in other.names(step.stage)]
    return next((stage_folder(key, step.fingerprint) for key in keys if step.fingerprint in other.names(key)), None)


def _inputs_here(manifest: Manifest, step: Step, store: Store) -> dict[str, InputRef] | None:
    """Return the inputs of a shard by their folders here, where models may have other names.

    None if this run directory has other rows, or another adapted model, than the shard was computed from.
    """
    inputs = dict(manifest.inputs)
    for name, reference in manifest.inputs.items():
        if name not in step.inputs:
            continue  # the frozen plan, which is copied
        folder = stage_folder(step.inputs[name], reference.folder.rpartition("/")[2])
        if _digest_here(store, folder, manifest.shard) != reference.data_sha256:
            return None
        inputs[name] = reference.model_copy(update={"folder": folder})
    return inputs


def _digest_here(store: Store, folder: str, shard: int) -> str | None:
    """Return the hash of a shard's rows, or of the manifest of a model, in a folder; None if it is not there."""
    manifest = store.read_manifest(folder, shard)
    if manifest is not None:
        return manifest.data.sha256
    try:
        return sha256(store.read(f"{folder}/{MANIFEST}"))
    except FileNotFoundError:
        return None


def _at(file: DataFile | None, other: Store) -> DataFile | None:
    """Return the file with its location set to the other run directory, unless it is elsewhere already."""
    return file if file is None or file.home is not None else file.model_copy(update={"home": other.url})
