"""Count how much of a training survives rounding to bfloat16, the precision in which most programs load a model."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.models.config import ModelConfig
from stages.models.weights import model_file, tensor_files


@dataclass(frozen=True)
class RoundingSurvival:
    """Number of weights that a training changed, and of the changes that survive rounding.

    Attributes:
        num_changed: weights whose float32 value differs from before.
        num_surviving: those of them that still differ when both are rounded to bfloat16.
    """

    num_changed: int
    num_surviving: int

    @property
    def share(self) -> float:
        """Share of the changes that survive; 1 if nothing changed."""
        return self.num_surviving / self.num_changed if self.num_changed else 1.0


def count_changes(before: Tensor, after: Tensor) -> RoundingSurvival:
    """Count one tensor's changed weights, and those whose change survives.

    Args:
        before: tensor before training, of any floating type.
        after: tensor after training, of the same shape.
    """
    before, after = before.float(), after.float()
    changed = before != after
    surviving = changed & (before.bfloat16() != after.bfloat16())
    return RoundingSurvival(int(changed.sum()), int(surviving.sum()))


@torch.no_grad()
def rounding_survival(model: ModelConfig, weights: Mapping[str, Tensor]) -> RoundingSurvival | None:
    """Compare trained weights with those of the model that was trained, tensor by tensor.

    Args:
        model: the model before training; its safetensors are read one tensor at a time.
        weights: the trained weights by their names in those files.

    Returns:
        None where there is nothing to compare: no safetensors (GGUF), or other names or shapes in them. Quantised tensors
        are left out.
    """
    from safetensors import safe_open

    files = tensor_files(model)
    total: RoundingSurvival | None = None
    with contextlib.ExitStack() as stack:
        opened: dict[str, Any] = {}
        for name in sorted(files.keys() & weights.keys()):
            if files[name] not in opened:
                path = model_file(model, files[name])
                opened[files[name]] = stack.enter_context(safe_open(str(path), framework="pt"))
            before = opened[files[name]].get_tensor(name)
            if not before.is_floating_point() or before.shape != weights[name].shape:
                continue
            if before.element_size() == 1:  # FP8, which is a weight only together with its scale
                continue
            changes = count_changes(before, weights[name].cpu())
            total = total or RoundingSurvival(0, 0)
            total = RoundingSurvival(
                total.num_changed + changes.num_changed, total.num_surviving + changes.num_surviving
            )
    return total
