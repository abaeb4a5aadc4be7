"""A model's safetensors files: which holds which tensor."""

import json
from pathlib import Path

from stages.models.config import ModelConfig


def tensor_files(model: ModelConfig) -> dict[str, str]:
    """Each tensor's name with the name of its file, for ``model_file``; empty for a model without safetensors.

    Raises:
        OSError: the hub cannot be reached.
    """
    from safetensors import safe_open

    if model.is_gguf:
        return {}
    index = model_file(model, "model.safetensors.index.json")
    if index is not None:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return weight_map
    file = model_file(model, "model.safetensors")
    if file is None:
        return {}
    with safe_open(str(file), framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), file.name)


def model_file(model: ModelConfig, name: str) -> Path | None:
    """One of the model's files: in its folder, or fetched from the hub (or its cache); None where it has none."""
    from transformers.utils.hub import cached_file

    if model.path is not None:
        file = model.path / name
        return file if file.exists() else None
    found = cached_file(model.hub, name, revision=model.revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)
