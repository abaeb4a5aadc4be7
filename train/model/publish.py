"""The finished model in an object store, its manifest last: the proof that training is done."""

import json
import logging
from pathlib import Path
from typing import Any

from stages.contract.store import Store
from train.job import MANIFEST
from train.model.card import CARD

logger = logging.getLogger(__name__)

LOGS = ("log.jsonl",)


def publish_model(output: Path, url: str) -> None:
    """Upload a finished model from the machine that exported it; nothing if the store has it.

    Args:
        output: the job's folder on this machine, with its manifest.
        url: a folder in an object store.

    Raises:
        StoreError: a file cannot be uploaded; the manifest is not published then.
    """
    store = Store(url)
    raw = (output / MANIFEST).read_bytes()
    if read_published(url) == json.loads(raw):
        return
    for name in json.loads(raw)["model_files"]:
        store.upload(f"model/{name}", output / "model" / name)
    store.upload(f"model/{CARD}", output / "model" / CARD)
    for name in LOGS:
        if (output / name).is_file():
            store.upload(name, output / name)
    store.replace(MANIFEST, raw)
    logger.info("the model and its manifest are at %s", url)


def read_published(url: str) -> dict[str, Any] | None:
    """Return the manifest of a model in an object store; None where there is none.

    Raises:
        StoreError: the store cannot be read.
    """
    try:
        return json.loads(Store(url).read(MANIFEST))
    except FileNotFoundError:
        return None
