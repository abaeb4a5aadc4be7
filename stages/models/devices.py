"""Where a model runs, and with which attention: one answer for logits, training and evaluation."""

import importlib.util
import re
import resource
import sys
from pathlib import Path
from typing import Final

import torch

_STATUS: Final = Path("/proc/self/status")


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


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far: of its GPU, or of the machine where it computes on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most of the machine's memory that this process has held so far."""
    try:
        return resident_bytes("VmHWM")
    except LookupError:  # this figure is inherited: it begins at the peak of the process that forked this one
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes(field: str) -> int:
    """What Linux tells of this process's memory: ``VmRSS``, held now, or ``VmHWM``, the most that was held.

    Raises:
        LookupError: it is not told: on other systems, and in sandboxes that imitate Linux.
    """
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text()) if _STATUS.exists() else None
    if found is None:
        raise LookupError(f"{_STATUS} has no {field}: it is Linux that tells of a process's memory there")
    return int(found[1]) * 1024
