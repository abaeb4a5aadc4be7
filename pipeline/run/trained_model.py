"""Models that a run trained (the target and adapted sources), on local disk and in an object store.

Training works in a local folder, and its workers publish what they made: each checkpoint is copied to the store
(``train.checkpoints.mirror``), and the finished model at the end (``train.model.publish``). A killed training
resumes from the folder if that outlives the process, else from the newest copy.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.run.session import Run, StageError, command
from pipeline.run.stage_table import FUSED
from pipeline.run.steps import Step
from stages.contract.digest import file_sha256, sha256
from stages.contract.manifest import stage_folder
from stages.contract.store import Store, publish_folder
from stages.models.config import ModelConfig
from train.job import MANIFEST
from train.model.card import CARD
from train.model.publish import LOGS, publish_model

if TYPE_CHECKING:
    from train.checkpoints.mirror import CheckpointMirror


def target_step(run: Run) -> Step:
    """Return the step that trains the target."""
    return run.resolved.steps["train"]


def local_folder(run: Run, step: Step) -> Path:
    """Return the step's folder in a local run directory, else its folder in ``engine.scratch``."""
    return folder_here(run.store, step.folder, run.config.engine.scratch)


def folder_here(store: Store, folder: str, scratch: Path | None) -> Path:
    """Return a folder of a local run directory; for a remote one, the corresponding folder in ``engine.scratch``."""
    if store.is_local:
        return Path(store.path(folder))
    if scratch is None:
        scratch = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptafuse" / "scratch"
    return scratch.expanduser().absolute() / sha256(store.url.encode())[:12] / folder


def checkpoint_store(run: Run, step: Step) -> str | None:
    """Return the URL that checkpoints are copied to: the step's folder in a remote run directory.

    Returns None for a local run directory.
    """
    return None if run.store.is_local else run.store.full_url(step.folder)


def checkpoint_copies(run: Run, step: Step) -> "CheckpointMirror | None":
    """Return the copies of the job's checkpoints in a remote run directory; None for a local one."""
    from train.checkpoints.mirror import CheckpointMirror

    url = checkpoint_store(run, step)
    return None if url is None else CheckpointMirror(url, keep=run.config.train.keep_checkpoints)


def fetch_checkpoint(run: Run, step: Step) -> None:
    """Fetch the newest checkpoint from a remote run directory unless this machine, which trains, has one as new."""
    copies = checkpoint_copies(run, step)
    fetched = copies and copies.fetch(local_folder(run, step))
    if fetched:
        run.console.print(f"{step.key}: fetched the checkpoint of step {fetched} from {run.store.url}", soft_wrap=True)


def publish_card(run: Run, step: Step) -> None:
    """Upload the model card, which the evaluation completes, to a remote run directory."""
    if not run.store.is_local:
        run.store.upload(f"{step.folder}/model/{CARD}", local_folder(run, step) / "model" / CARD)


def trained_model(run: Run, step: Step) -> Path:
    """Return a local folder with the trained model of a step; see ``fetch_model``."""
    return fetch_model(run.store, step.folder, run.config.engine.scratch)


def fetch_model(store: Store, folder: str, scratch: Path | None) -> Path:
    """Return a local folder with a trained model; files that are missing or differ are fetched from the run directory.

    Args:
        store: the run directory.
        folder: folder of the step that trained it.
        scratch: ``engine.scratch``.

    Raises:
        FileNotFoundError: the model is not trained, or a file of it is gone.
        ValueError: a fetched file is not the one that the training's manifest names.
    """
    model = folder_here(store, folder, scratch) / "model"
    if store.is_local:
        return model
    for name, digest in json.loads(store.read(f"{folder}/{MANIFEST}"))["model_files"].items():
        store.path(name)  # refuses one that would leave the folder
        if (model / name).is_file() and file_sha256(model / name) == digest:
            continue
        store.download(f"{folder}/model/{name}", model / name)
        if file_sha256(model / name) != digest:
            stage = folder.split("/", maxsplit=1)[0]
            raise ValueError(
                f"{store.url}/{folder}/model/{name} is not the file that was written: run `ptafuse verify "
                f"{store.url} --repair`, then `make {stage}`"
            )
    if not (model / CARD).is_file():
        store.download(f"{folder}/model/{CARD}", model / CARD)
    return model


def import_model(run: Run, step: Step, other: Store) -> bool:
    """Copy an adapted source from another run directory, which trained it under the same fingerprint.

    The source may have another name there.

    Returns:
        Whether it is there.

    Raises:
        ValueError: a file of it is missing there, or is not the one that its manifest names; says what to run.
    """
    folders = [stage_folder(f"{step.stage}/{name}", step.fingerprint) for name in other.names(step.stage)]
    folder = next((folder for folder in folders if other.exists(f"{folder}/{MANIFEST}")), None)
    if folder is None:
        return False
    raw = other.read(f"{folder}/{MANIFEST}")
    output = local_folder(run, step)
    try:
        _copy_model(
            fetch_model(other, folder, run.config.engine.scratch), output / "model", json.loads(raw)["model_files"]
        )
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"{other.url}/{folder} is marked as done, and its model cannot be copied: {error}. Run `ptafuse verify "
            f"{other.url} --repair` and then {command(run, step.stage)}, or remove logits_from: both adapt the source here"
        ) from error
    for name in LOGS:
        if other.exists(f"{folder}/{name}"):
            (output / name).write_bytes(other.read(f"{folder}/{name}"))
    Store(str(output)).replace(MANIFEST, raw)
    if not run.store.is_local:
        publish_model(output, run.store.full_url(step.folder))
    return True


def _copy_model(source: Path, folder: Path, files: Mapping[str, str]) -> None:
    """Copy the files of a finished model and its card, checked by their hashes; the folder appears whole."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    if temporary.exists():
        shutil.rmtree(temporary)
    for name, digest in {**files, CARD: None}.items():
        copy = temporary / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, copy)
        if digest is not None and file_sha256(copy) != digest:
            raise ValueError(f"{source / name} is not the file that was written")
    publish_folder(temporary, folder)


def evaluated_model(run: Run, step: Step) -> ModelConfig:
    """Return the model that an eval step evaluates; the trained one as its exported folder."""
    if step.model == FUSED:
        return ModelConfig(
            name=FUSED,
            path=trained_model(run, target_step(run)),
            bos=run.config.target.bos,
            control_tokens=run.config.target.control_tokens,
            reads_conversations=run.config.target.reads_conversations,
            chat_template=run.config.target.chat_template,
        )
    return run.config.find_model(step.model)


def is_trained(run: Run, step: Step | None = None) -> bool:
    """Return whether a training is done: by default the target's.

    Raises:
        StageError: its manifest says so, but files of the model are missing.
    """
    step = target_step(run) if step is None else step
    folder = step.folder
    try:
        manifest = json.loads(run.store.read(f"{folder}/{MANIFEST}"))
    except FileNotFoundError:
        return False
    missing = [name for name in manifest["model_files"] if not run.store.exists(f"{folder}/model/{name}")]
    if missing:
        raise StageError(
            f"{run.store.url}/{folder} is marked as done, but {', '.join(missing)} of its model is missing: run "
            f"`ptafuse verify {run.store.url} --repair`, then {command(run, step.stage)}"
        )
    return True


def discard_model(run: Run) -> None:
    """Remove the trained target and its checkpoints, which are large; its step log stays.

    The step counts as not done afterwards, so the manifest goes first.
    """
    step = target_step(run)
    folder = step.folder
    if not run.store.is_local:
        run.store.delete(f"{folder}/{MANIFEST}")
        for name in run.store.names(f"{folder}/model"):
            run.store.delete(f"{folder}/model/{name}")
    copies = checkpoint_copies(run, step)
    if copies:
        copies.remove()
    here = local_folder(run, step)
    (here / MANIFEST).unlink(missing_ok=True)
    for model_folder in (*here.glob("model"), *here.glob("checkpoint-*")):
        shutil.rmtree(model_folder)
