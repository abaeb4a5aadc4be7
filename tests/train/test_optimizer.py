import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import _foreach_supported_types
from torch.utils._foreach_utils import _get_foreach_kernels_supported_devices
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.config import TrainConfig
from train.optimizer import build_optimizer, learning_rate, parameter_groups


def test_norms_and_biases_do_not_decay():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    decaying, plain = parameter_groups(model, 0.1)
    assert decaying["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    assert {tuple(parameter.shape) for parameter in decaying["params"]} == {(5, 4), (3, 4)}
    assert {tuple(parameter.shape) for parameter in plain["params"]} == {(3,)}
    assert sum(map(len, (decaying["params"], plain["params"]))) == len(list(model.parameters()))


def test_optimizer_has_the_configured_settings():
    optimizer = build_optimizer(nn.Linear(2, 2), TrainConfig(adam_beta1=0.8, adam_beta2=0.9, learning_rate=3e-4))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.8, 0.9)] * 2


def test_rate_rises_linearly_then_falls_by_a_half_cosine():
    config = TrainConfig(learning_rate=1.0, warmup_ratio=0.2)
    rates = [learning_rate(step, 10, config) for step in range(10)]
    assert rates[:2] == pytest.approx([0.5, 1.0])
    assert rates[2:] == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)])
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    assert min(rates) > 0


def test_warm_up_is_rounded_up_to_whole_steps():
    config = TrainConfig(learning_rate=1.0, warmup_ratio=0.008)
    assert learning_rate(0, 1000, config) == pytest.approx(1 / 8)
    assert learning_rate(0, 3, config) == 1.0
    assert learning_rate(1, 3, config) == 1.0


def test_constant_rate_stays_after_the_warm_up():
    config = TrainConfig(learning_rate=1.0, warmup_ratio=0.5, schedule="constant")
    assert [learning_rate(step, 4, config) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_training_may_consist_of_warm_up_only():
    config = TrainConfig(learning_rate=1.0, warmup_ratio=1.0)
    assert [learning_rate(step, 2, config) for step in range(2)] == [0.5, 1.0]


class Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, in place of changing one that is there.

    Attributes:
        num_bytes: by the name of the operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if not function._schema.is_mutable:
            tensors = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
            self.num_bytes[function.overloadpacket.__name__] += sum(tensor.nbytes for tensor in tensors)
        return found


def updated(*, foreach: bool) -> tuple[Counter[str], int]:
    """Return the bytes that the second update of a model makes, and the size of its parameters."""
    model = nn.Sequential(nn.Embedding(50, 40), nn.Linear(40, 30), nn.Linear(30, 20))
    optimizer = build_optimizer(model, TrainConfig())
    for group in optimizer.param_groups:
        group["foreach"] = foreach
    for _ in range(2):  # the first makes the moments too
        model(torch.arange(50)).sum().backward()
        with Allocations() as allocations:
            optimizer.step()
        optimizer.zero_grad()
    return allocations.num_bytes, sum(parameter.nbytes for parameter in model.parameters())


def test_an_update_makes_one_copy_of_the_trained_parameters_as_the_memory_estimate_says():
    made, parameters = updated(foreach=True)
    assert made.pop("_foreach_sqrt") == parameters
    assert sum(made.values()) <= 0.01 * parameters, made
    # FSDP's shards are DTensors, and an optimizer over other types than these does not use `foreach`.
    assert DTensor in _foreach_supported_types
    assert _get_foreach_kernels_supported_devices()[0] == "cuda"


def test_without_foreach_an_update_makes_two_copies_tensor_by_tensor():
    made, parameters = updated(foreach=False)
    assert (made.pop("sqrt"), made.pop("div")) == (parameters, parameters)
    assert sum(made.values()) <= 0.01 * parameters, made
