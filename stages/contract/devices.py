"""Where a model runs, and with which attention: one answer for logits, training and evaluation."""

import importlib.util

import torch


def resolve_device(device: str) -> torch.device:
    """``auto`` is a GPU if there is one.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda', but torch sees no GPU here: set device = 'auto' or 'cpu'")
    return torch.device(device)


def attention_choices(attention: str, device: torch.device, *, half_precision: bool) -> tuple[str, ...]:
    """Attention implementations to try, best first; ``auto`` begins with FlashAttention 2 where it can be used.

    Args:
        attention: as configured.
        device: where the model runs.
        half_precision: activations are float16 or bfloat16, which FlashAttention needs.
    """
    if attention != "auto":
        return (attention,)
    if device.type == "cuda" and half_precision and importlib.util.find_spec("flash_attn") is not None:
        return ("flash_attention_2", "sdpa", "eager")
    return ("sdpa", "eager")


def set_threads(device: torch.device, cpus: float) -> None:
    """On a CPU, compute with as many threads as the process has CPUs."""
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(cpus)))
