"""AdamW and its learning rate."""

import math
from typing import Any

import torch
from torch import nn

from train.config import TrainConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups: weights decay; norms and biases (fewer than two dimensions) do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Build AdamW over the model's trained parameters; the learning rate is set before every step."""
    return torch.optim.AdamW(
        [group for group in parameter_groups(model, config.weight_decay) if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
    )


def learning_rate(step: int, num_steps: int, config: TrainConfig) -> float:
    """Compute the learning rate of optimizer step ``step`` (from 0) of ``num_steps``.

    The rate rises linearly over ceil(warmup_ratio * num_steps) steps and reaches its peak at the last of them. Then it is
    constant, or falls by a half cosine that would reach 0 at step ``num_steps``: no step is spent at rate 0.
    """
    num_warmup = math.ceil(config.warmup_ratio * num_steps)
    if step < num_warmup:
        return config.learning_rate * (step + 1) / num_warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - num_warmup) / (num_steps - num_warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
