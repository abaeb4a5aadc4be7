"""Device and attention implementation of a model, decided in one place for logits, training and evaluation."""

import importlib
import importlib.util
import logging
import os
import re
import resource
import socket
import sys
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

log = logging.getLogger(__name__)

_STATUS: Final = Path("/proc/self/status")
_DRIVER: Final = Path("/proc/driver/nvidia/version")
_DRIVER_VERSION: Final = re.compile(r"Kernel Module.*?\s(\d+(?:\.\d+)+)")
_OLDEST_DRIVER: Final = {"12": 525, "13": 580}
"""CUDA's major version -> oldest branch of NVIDIA's driver that runs it, as CUDA's release notes say."""


def resolve_device(device: str) -> torch.device:
    """Resolve ``auto`` to a GPU if there is one, else to the CPU.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device = 'cuda', but torch sees no GPU here: {no_cuda_reason()}; or set device = 'auto' or 'cpu'"
        )
    return torch.device(device)


def require_cuda(step: str) -> None:
    """Refuse to compute on CPUs in a process that has a GPU reserved.

    Args:
        step: name of the step that computes, for the message.

    Raises:
        ValueError: torch sees no GPU; says why, and what to do.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            f"{step} has a GPU reserved on {socket.gethostname()}, and torch sees no GPU there: {no_cuda_reason()}"
        )


def no_cuda_reason() -> str:
    """Return why torch sees no GPU, as far as it can be known, and what to do."""
    wanted = torch.version.cuda
    if wanted is None:
        return f"torch {torch.__version__} is a build without CUDA; install one with it (PyPI's torch is one)"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES = {visible!r} hides every GPU; unset it"
    if not _DRIVER.exists():
        return (
            f"there is no NVIDIA driver ({_DRIVER} is missing); install one, or start the container with its GPUs "
            "(docker run --gpus all, runtimeClassName nvidia)"
        )
    match = _DRIVER_VERSION.search(_DRIVER.read_text())
    driver, oldest = match[1] if match else "unknown", _OLDEST_DRIVER.get(wanted.split(".", maxsplit=1)[0])
    if match and oldest is not None and int(driver.split(".", maxsplit=1)[0]) < oldest:
        return (
            f"its NVIDIA driver is {driver}, and torch {torch.__version__} for CUDA {wanted} needs {oldest} or newer; update "
            "the driver, or install a torch for an older CUDA"
        )
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"NVIDIA driver {driver}, torch for CUDA {wanted}: {str(error).splitlines()[0]}"
    return f"NVIDIA driver {driver}, torch for CUDA {wanted}; does `nvidia-smi` list a GPU?"


def attention_choices(attention: str, device: torch.device, *, half_precision: bool) -> tuple[str, ...]:
    """List the attention implementations to try, best first; ``auto`` begins with FlashAttention 2 if it can be used.

    Args:
        attention: configured value.
        device: device of the model.
        half_precision: activations are float16 or bfloat16, which FlashAttention needs.
    """
    if attention != "auto":
        return (attention,)
    if device.type == "cuda" and half_precision and flash_attention_obstacle(device) is None:
        return ("flash_attention_2", "sdpa", "eager")
    return ("sdpa", "eager")


@cache
def flash_attention_obstacle(device: torch.device) -> str | None:
    """Return why FlashAttention 2 cannot be used on a device; None if it can. Logged once in a process.

    An installed package may be unusable: built for another torch it cannot be imported, and built for other GPUs it fails at
    its first call, an hour after the start.
    """
    if importlib.util.find_spec("flash_attn") is None:
        obstacle = "it is not installed"
    else:
        try:
            states = torch.zeros((1, 1, 1, 64), dtype=torch.bfloat16, device=device)
            importlib.import_module("flash_attn").flash_attn_func(states, states, states, causal=True)
        except Exception as error:  # noqa: BLE001 - whatever a broken package raises: SDPA computes the same
            reason = str(error).strip().split("\n", 1)[0]
            obstacle = f"it is installed and broken ({type(error).__name__}: {reason})"
        else:
            return None
    log.warning("FlashAttention 2 is not used: %s. SDPA gives the same results, more slowly", obstacle)
    return obstacle


def attention_in_use(loaded: Any) -> str:
    """Return the attention implementation that a transformers model computes with."""
    return str(loaded.config.get_text_config()._attn_implementation)


def set_threads(device: torch.device, cpus: float) -> None:
    """Compute with as many threads as the process has CPUs, if it computes on a CPU."""
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(cpus)))


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: of its GPU, or of the machine if it computes on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Return the peak resident memory of this process."""
    try:
        return resident_bytes("VmHWM")
    except LookupError:  # this figure is inherited: it begins at the peak of the process that forked this one
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes(field: str) -> int:
    """Read this process's memory from Linux: ``VmRSS``, resident now, or ``VmHWM``, the peak.

    Raises:
        LookupError: the value is missing: on other systems, and in sandboxes that imitate Linux.
    """
    match = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text()) if _STATUS.exists() else None
    if match is None:
        raise LookupError(f"{_STATUS} has no {field}: only Linux reports a process's memory there")
    return int(match[1]) * 1024
