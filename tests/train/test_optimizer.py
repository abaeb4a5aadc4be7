import math

import pytest
import torch
from torch import nn

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


def test_warm_up_alone_is_possible():
    config = TrainConfig(learning_rate=1.0, warmup_ratio=1.0)
    assert [learning_rate(step, 2, config) for step in range(2)] == [0.5, 1.0]
