"""Random models of real shapes, made where they run: no checkpoint is on disk."""

import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.models.config import ModelConfig
from tests.gpu.sizes import LLAMA_2_7B

UNUSED = ModelConfig(name="random", path=Path("unused"))
"""Stands in for where a model is, which nobody asks where the model is in memory."""


def llama_config(changes: Mapping[str, Any]) -> Any:
    """Return Llama-2-7B's configuration with changes."""
    settings = {**json.loads(LLAMA_2_7B.read_text()), **changes}
    if "num_attention_heads" in changes:
        settings["num_key_value_heads"] = changes["num_attention_heads"]
    return model_config(settings.pop("model_type"), settings)


def model_config(model_type: str, settings: Mapping[str, Any]) -> Any:
    """Return a configuration whose random weights keep the states' size from layer to layer, so that all of them matter."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type, **settings, pad_token_id=None)
    config.initializer_range = config.hidden_size**-0.5
    return config


def random_model(config: Any, *, device: str, dtype: torch.dtype, attention: str, seed: int = 0) -> Any:
    """Make a model with random weights, in eval mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)
    return model.eval()


def copied_model(model: Any, *, device: str, dtype: torch.dtype) -> Any:
    """Return a model of the same weights elsewhere, as if it had been loaded there in this precision.

    ``model.to(dtype)`` would round its buffers too: rotary frequencies stay float32 in a model that is loaded in bfloat16.
    """
    attention = model.config._attn_implementation
    copied = random_model(model.config, device=device, dtype=dtype, attention=attention)
    copied.load_state_dict(model.state_dict())
    return copied


def synchronize(device: str) -> None:
    """Wait for what was begun on a device."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], object], device: str) -> float:
    """Return the seconds that a call takes, until the device has finished."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def median_seconds(work: Callable[[], object], device: str, rounds: int) -> float:
    """Return the median over some calls, after a warm one."""
    work()
    return statistics.median(timed(work, device) for _ in range(rounds))


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two tensors, over the largest entry of the second; on the CPU in float64."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
