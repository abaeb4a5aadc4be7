"""Choice of the backend that runs a model, if the configuration leaves it open."""

from typing import Literal

from stages.logits.backends.vllm import is_installed, knows_architecture
from stages.logits.config import LogitsConfig
from stages.models.config import ModelConfig
from stages.models.devices import resolve_device


def choose_backend(config: LogitsConfig, model: ModelConfig) -> Literal["transformers", "vllm", "server"]:
    """Choose the backend for a worker on this machine: the configured one; ``auto``: vLLM if it can run the model.

    Raises:
        ValueError: ``device = 'cuda'`` and torch sees no GPU here; or ``auto`` resolves to transformers, and
            ``tensor_parallel_size`` asks for more than one GPU.
    """
    if config.backend != "auto":
        return config.backend
    obstacle = _obstacle(config, model)
    if obstacle is None:
        return "vllm"
    if config.tensor_parallel_size > 1:
        raise ValueError(
            f"model {model.name}: logits.tensor_parallel_size = {config.tensor_parallel_size} needs vLLM, which cannot be "
            f"used here: {obstacle}"
        )
    return "transformers"


def _obstacle(config: LogitsConfig, model: ModelConfig) -> str | None:
    """Explain why vLLM cannot be used, the cheapest check first; None if it can."""
    if config.tail_samples:
        return "logits.tail_samples draws from the full distribution, and vLLM returns only the largest entries"
    if resolve_device(config.device).type != "cuda":
        return "no GPU is used"
    if not is_installed():
        return "it is not installed"
    if model.is_gguf:
        return "the weights are a GGUF file"
    if not knows_architecture(model):
        return "it does not know this architecture"
    return None
