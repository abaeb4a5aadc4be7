"""Input embeddings of a model, loaded without the rest of the model if its files allow that."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.models.config import ModelConfig, load_model
from stages.models.weights import model_file, tensor_files

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def load_input_embeddings(model: ModelConfig) -> np.ndarray:
    """Load the rows that the model's input layer looks up.

    Only that tensor is read if it is in safetensors under its own name; weights in another form (GGUF, names that transformers
    changes while loading) are loaded as a whole, once, and freed.

    Args:
        model: which model.

    Returns:
        (V, H) float16, V the model's vocabulary with its padding.

    Raises:
        ValueError: the model's files are unavailable.
    """
    embeddings = None if model.is_gguf else _read_tensor(model)
    if embeddings is None:
        logger.info(
            "model %s: its files do not contain the input embeddings as a separate tensor; loading the whole model",
            model.name,
        )
        whole = load_model(model, dtype="float32", attention=("eager",), device="cpu")
        embeddings = whole.get_input_embeddings().weight.detach()
    return embeddings.half().numpy()


def _read_tensor(model: ModelConfig) -> "torch.Tensor | None":
    from safetensors import safe_open

    skeleton = _skeleton(model)
    weight = skeleton.get_input_embeddings().weight
    parameters = skeleton.named_parameters(remove_duplicate=False)
    name = next(name for name, parameter in parameters if parameter is weight)
    place = _file_of(model, _checkpoint_names(name, skeleton))
    if place is None:
        return None
    file, stored_name = place
    with safe_open(str(file), framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(stored_name)
    return tensor if tensor.shape == weight.shape else None


def _skeleton(model: ModelConfig) -> Any:
    """Build the model's modules without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    arguments = model.pretrained_arguments()
    try:
        config = AutoConfig.from_pretrained(**arguments, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:  # transformers: no such file, an unreachable hub, an unknown architecture
        raise ValueError(f"model {model.name}: its configuration cannot be loaded: {error}") from error
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)


def _checkpoint_names(name: str, skeleton: Any) -> list[str]:
    """List the names under which the tensor may be stored: some checkpoints hold only the body, without its prefix."""
    prefix = f"{skeleton.base_model_prefix}."
    return [name, name.removeprefix(prefix)] if name.startswith(prefix) else [name]


def _file_of(model: ModelConfig, names: list[str]) -> tuple[Path, str] | None:
    """Find the safetensors file that holds one of these tensors; also return the tensor's name there."""
    files = tensor_files(model)
    stored = next((name for name in names if name in files), None)
    file = None if stored is None else model_file(model, files[stored])
    return None if file is None or stored is None else (file, stored)
