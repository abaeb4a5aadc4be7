"""Training for a run directory in an object store: it works in a local folder, and publishes what it made at its end.

Checkpoints stay in that folder: a killed training goes on from them where the folder outlives the process, so on machines
that disappear it belongs on a disk that stays (``engine.scratch``).
"""

import hashlib
import json
import logging
import os
from pathlib import Path

from pipeline.engine import Run
from pipeline.plan import Step
from stages.contract.manifest import sha256
from train.card import CARD

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


def publish_training(run: Run, output: Path) -> None:
    """Put the finished model into a remote run directory, its manifest last: the proof that training is done."""
    if run.store.is_local:
        return
    folder = run.resolved.steps["train"].folder
    raw = (output / "manifest.json").read_bytes()
    for name in json.loads(raw)["model_files"]:
        run.store.upload(f"{folder}/model/{name}", output / "model" / name)
    publish_card(run)
    for name in LOGS:
        if (output / name).is_file():
            run.store.upload(f"{folder}/{name}", output / name)
    run.store.replace(f"{folder}/manifest.json", raw)
    log.info("the model and its manifest are at %s/%s; checkpoints stay in %s", run.store.url, folder, output)


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
    for name, digest in json.loads(run.store.read(f"{folder}/manifest.json"))["model_files"].items():
        run.store.path(name)  # refuses one that would leave the folder
        if _sha256(model / name) == digest:
            continue
        run.store.download(f"{folder}/model/{name}", model / name)
        if _sha256(model / name) != digest:
            raise ValueError(
                f"{run.store.url}/{folder}/model/{name} is not the file that was written: run `ptafuse verify "
                f"{run.store.url} --repair`, then `make train`"
            )
    if not (model / CARD).is_file():
        run.store.download(f"{folder}/model/{CARD}", model / CARD)
    return model


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
