"""The trained model of a run, local and in an object store.

Training works in a local folder, and publishes what it made at its end. Each committed checkpoint is copied to the store
(``train.checkpoints.mirror``): a training that was killed goes on from the folder where that outlives the process, and from
the newest copy where it does not.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.run.session import Run, StageError, command
from pipeline.run.stage_table import FUSED
from pipeline.run.steps import Step
from stages.contract.digest import file_sha256, sha256
from stages.models.config import ModelConfig
from train.job import MANIFEST
from train.model.card import CARD

if TYPE_CHECKING:
    from train.checkpoints.mirror import CheckpointMirror

log = logging.getLogger(__name__)

LOGS = ("log.jsonl",)


def training_folder(run: Run) -> Path:
    """Where training writes."""
    return local_folder(run, run.resolved.steps["train"])


def local_folder(run: Run, step: Step) -> Path:
    """The step's folder in a local run directory, else one of its own in ``engine.scratch``."""
    folder = step.folder
    if run.store.is_local:
        return Path(run.store.path(folder))
    scratch = run.config.engine.scratch
    if scratch is None:
        scratch = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptafuse" / "scratch"
    return scratch.expanduser().absolute() / sha256(run.store.url.encode())[:12] / folder


def checkpoint_store(run: Run) -> str | None:
    """Where checkpoints are copied to: the step's folder in a remote run directory."""
    return None if run.store.is_local else run.store.full_url(run.resolved.steps["train"].folder)


def checkpoint_copies(run: Run) -> "CheckpointMirror | None":
    """The copies of the job's checkpoints in a remote run directory; None for a local one."""
    from train.checkpoints.mirror import CheckpointMirror

    url = checkpoint_store(run)
    return None if url is None else CheckpointMirror(url, keep=run.config.train.keep_checkpoints)


def fetch_checkpoint(run: Run, output: Path) -> None:
    """Bring the newest checkpoint from a remote run directory where this machine has none that is as new."""
    copies = checkpoint_copies(run)
    step = copies and copies.fetch(output)
    if step:
        run.console.print(f"train: fetched the checkpoint of step {step} from {run.store.url}", soft_wrap=True)


def publish_training(run: Run, output: Path) -> None:
    """Put the finished model into a remote run directory, its manifest last: the proof that training is done."""
    if run.store.is_local:
        return
    folder = run.resolved.steps["train"].folder
    raw = (output / MANIFEST).read_bytes()
    for name in json.loads(raw)["model_files"]:
        run.store.upload(f"{folder}/model/{name}", output / "model" / name)
    publish_card(run)
    for name in LOGS:
        if (output / name).is_file():
            run.store.upload(f"{folder}/{name}", output / name)
    run.store.replace(f"{folder}/{MANIFEST}", raw)
    log.info("the model and its manifest are at %s/%s", run.store.url, folder)


def publish_card(run: Run) -> None:
    """Put the model card, which evaluation completes, into a remote run directory."""
    if not run.store.is_local:
        folder = run.resolved.steps["train"].folder
        run.store.upload(f"{folder}/model/{CARD}", training_folder(run) / "model" / CARD)


def trained_model(run: Run) -> Path:
    """A local folder with the trained model, fetched from a remote run directory where it is not here or differs.

    Raises:
        FileNotFoundError: the model is not trained, or a file of it is gone.
        ValueError: a fetched file is not the one that the training's manifest names.
    """
    model = training_folder(run) / "model"
    if run.store.is_local:
        return model
    folder = run.resolved.steps["train"].folder
    for name, digest in json.loads(run.store.read(f"{folder}/{MANIFEST}"))["model_files"].items():
        run.store.path(name)  # refuses one that would leave the folder
        if (model / name).is_file() and file_sha256(model / name) == digest:
            continue
        run.store.download(f"{folder}/model/{name}", model / name)
        if file_sha256(model / name) != digest:
            raise ValueError(
                f"{run.store.url}/{folder}/model/{name} is not the file that was written: run `ptafuse verify "
                f"{run.store.url} --repair`, then `make train`"
            )
    if not (model / CARD).is_file():
        run.store.download(f"{folder}/model/{CARD}", model / CARD)
    return model


def evaluated_model(run: Run, step: Step) -> ModelConfig:
    """The model that an eval step speaks of; the trained one as the folder it was exported to."""
    if step.model == FUSED:
        return ModelConfig(name=FUSED, path=trained_model(run), bos=run.config.target.bos)
    return run.config.find_model(step.model)


def is_trained(run: Run) -> bool:
    """The train stage of this run is done.

    Raises:
        StageError: its manifest says so, but files of the model are missing.
    """
    folder = run.resolved.steps["train"].folder
    try:
        manifest = json.loads(run.store.read(f"{folder}/{MANIFEST}"))
    except FileNotFoundError:
        return False
    missing = [name for name in manifest["model_files"] if not run.store.exists(f"{folder}/model/{name}")]
    if missing:
        raise StageError(
            f"{run.store.url}/{folder} is said to be done, but {', '.join(missing)} of its model is missing: run "
            f"`ptafuse verify {run.store.url} --repair`, then {command(run, 'train')}"
        )
    return True


def discard_model(run: Run) -> None:
    """Remove a trained model and its checkpoints, which are large; its step log stays.

    The step counts as not done afterwards, so the manifest goes first.
    """
    folder = run.resolved.steps["train"].folder
    if not run.store.is_local:
        run.store.delete(f"{folder}/{MANIFEST}")
        for name in run.store.names(f"{folder}/model"):
            run.store.delete(f"{folder}/model/{name}")
    copies = checkpoint_copies(run)
    if copies:
        copies.remove()
    here = training_folder(run)
    (here / MANIFEST).unlink(missing_ok=True)
    for part in (*here.glob("model"), *here.glob("checkpoint-*")):
        shutil.rmtree(part)
