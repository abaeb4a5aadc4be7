"""Finished model on disk, and the manifest that proves that the job is done.

<output>/model/           the finished model, for from_pretrained
<output>/manifest.json    written last
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from stages.contract.digest import file_sha256
from stages.contract.store import publish_folder, sync
from stages.models.config import ModelConfig
from train.job import MANIFEST
from train.model.card import CARD
from train.model.carry_over import carry_over, keep_conversations


def export_model(
    folder: Path, model: Any, weights: dict[str, Tensor], tokenizer: Any, card: str, *, original: ModelConfig
) -> dict[str, str]:
    """Save the finished model for ``from_pretrained``; the folder appears whole, over an older one.

    Args:
        folder: folder to write to.
        model: the transformers model; its own parameters may be shards or have no values.
        weights: all of its weights.
        tokenizer: its tokenizer.
        card: the model card, Markdown.
        original: the model that was trained; files of its folder other than weights are kept.

    Returns:
        File name -> sha256, without the card, which evaluation completes.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    if temporary.exists():
        shutil.rmtree(temporary)
    model.save_pretrained(temporary, state_dict=weights)
    tokenizer.save_pretrained(temporary)
    carry_over(original, temporary)
    keep_conversations(original, temporary)
    (temporary / CARD).write_text(card)
    publish_folder(temporary, folder)  # no manifest names an older one: it was interrupted before its manifest
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / CARD)
    return {str(path.relative_to(folder)): file_sha256(path) for path in files}


def write_manifest(output: Path, manifest: dict[str, Any]) -> None:
    """Publish ``manifest.json`` whole: the proof that the job is done."""
    temporary = output / f".manifest.{os.getpid()}.json"
    temporary.write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n")
    sync(temporary)
    temporary.replace(output / MANIFEST)
    sync(output)


def read_manifest(output: Path) -> dict[str, Any] | None:
    """Read the manifest of a finished job; None if it is not finished."""
    try:
        return json.loads((output / MANIFEST).read_text())
    except FileNotFoundError:
        return None
