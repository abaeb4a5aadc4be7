"""Re-read a run directory against its manifests, and remove the manifests of what cannot be trusted."""

import json

from rich.console import Console

from pipeline.run.stage_table import SHARDED_STAGES
from stages.contract.digest import sha256
from stages.contract.manifest import Manifest
from stages.contract.store import Store
from stages.models.token_tables import FOLDER as TOKENIZERS
from stages.models.token_tables import DamagedTableError, check_file, is_table_file
from train.job import MANIFEST


def verify_run(store: Store, console: Console, *, repair: bool) -> int:
    """Check every file that a manifest names, and the token tables: it is there, and has the sha256 that was written.

    Args:
        store: the run directory.
        console: console to name bad files on.
        repair: remove the manifest of a shard with a bad file, so that its stage's command computes it again; and a bad
            table, which is made again where it is needed.

    Returns:
        How many shards, trained models and token tables are bad.
    """
    num_good, num_bad = 0, 0
    for folder in stage_folders(store):
        for name in store.manifest_names(folder):
            key = f"{folder}/manifests/{name}"
            problem = _problem(store, key)
            if problem is None:
                num_good += 1
                continue
            num_bad += 1
            console.print(f"{key}: {problem}", soft_wrap=True)
            if repair:
                store.delete(key)
                console.print(
                    f"{key}: its manifest is removed; run `make {folder.split('/', maxsplit=1)[0]}` to compute the shard again"
                )
    for folder in _training_folders(store):
        problem = _model_problem(store, folder)
        if problem is None:
            continue
        num_bad += 1
        console.print(f"{folder}: {problem}", soft_wrap=True)
        if repair:
            store.delete(f"{folder}/{MANIFEST}")
            stage = folder.split("/", maxsplit=1)[0]
            console.print(
                f"{folder}: its manifest is removed; run `make {stage}` to write the model again from the newest checkpoint"
            )
    console.print(f"{num_good} shards match their manifests; {num_bad} shards or models do not")
    return num_bad + _verify_tables(store, console, repair=repair)


def _verify_tables(store: Store, console: Console, *, repair: bool) -> int:
    """Return how many token tables and maps between vocabularies are bad."""
    num_good, num_bad = 0, 0
    keys = [entry.key for entry in store.files(TOKENIZERS) if is_table_file(entry.key)]
    for key, raw in store.read_all(keys):
        try:
            check_file(key, raw)
            num_good += 1
        except DamagedTableError as error:
            num_bad += 1
            console.print(f"{key}: {error}", soft_wrap=True)
            if repair:
                store.delete(key)
                console.print(f"{key}: removed; the next command that needs it rebuilds it", soft_wrap=True)
    if keys:
        console.print(f"{num_good} token tables and maps are intact; {num_bad} are not")
    return num_bad


def _training_folders(store: Store) -> list[str]:
    """List the folders of the run directory in which models are trained: the target, and adapted sources."""
    adapted = [f"adapt/{model}/{name}" for model in store.names("adapt") for name in store.names(f"adapt/{model}")]
    return [f"train/{name}" for name in store.names("train")] + adapted


def stage_folders(store: Store) -> list[str]:
    """List the folders of the run directory that hold a sharded stage's results, of any configuration."""
    folders = []
    for stage in (spec.name for spec in SHARDED_STAGES):
        for name in store.names(stage):
            if store.manifest_names(f"{stage}/{name}"):
                folders.append(f"{stage}/{name}")
            else:
                inner = [f"{stage}/{name}/{fingerprint}" for fingerprint in store.names(f"{stage}/{name}")]
                folders.extend(folder for folder in inner if store.manifest_names(folder))
    return folders


def _model_problem(store: Store, folder: str) -> str | None:
    """Describe what is wrong with a trained model; None if it is sound or not trained yet."""
    try:
        manifest = json.loads(store.read(f"{folder}/{MANIFEST}"))
    except FileNotFoundError:
        return None
    for name, digest in manifest["model_files"].items():
        key = f"{folder}/model/{name}"
        if not store.exists(key):
            return f"{key} is missing"
        if sha256(store.read(key)) != digest:
            return f"{key} is not the file that was written"
    return None


def _problem(store: Store, key: str) -> str | None:
    """Describe what is wrong with a shard; None if it is sound."""
    try:
        manifest = Manifest.from_bytes(store.read(key))
    except ValueError as error:
        return f"this is not a manifest: {error}"
    for file in (manifest.data, manifest.quarantine):
        if file is None:
            continue
        where = file.key if file.home is None else f"{file.home}/{file.key} (also verify that run directory)"
        try:
            raw = store.read_file(file)
        except FileNotFoundError:
            return f"{where} is missing"
        except ValueError as error:  # it leads out of the run directory, or to one that no configuration names
            return str(error)
        if sha256(raw) != file.sha256:
            return f"{where} is not the file that was committed (expected {file.num_bytes} bytes, found {len(raw)})"
    for name, reference in manifest.inputs.items():
        current = store.read_manifest(reference.folder, manifest.shard) if name != "plan" else None
        if current is not None and current.data.sha256 != reference.data_sha256:
            return f"{name} has been computed again since, with a different result"
    return None
