import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stages.contract.columns import PAD_ID
from tests.train.fused_files import random_rows
from train.loss import IGNORED, REST_EPSILON, SparseTargets, log_rest, loss_sums

P, H, V = 11, 6, 17


class Setting:
    """Hidden states, a head, labels and targets, with some of each missing."""

    def __init__(self, *, with_tail: bool, seed: int = 0):
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.hidden = torch.randn(P, H, requires_grad=True)
        self.head = nn.Linear(H, V)
        self.labels = torch.randint(0, V, (P,))
        self.labels[[3, 7, P - 1]] = IGNORED
        rows = random_rows(rng, P, V, mass=0.7 if with_tail else 1.0, empty=0.3)
        self.targets = SparseTargets(
            ids=torch.tensor(rows.ids, dtype=torch.int64),
            probs=torch.tensor(np.exp(rows.logprobs)),
            tail_mass=torch.tensor(np.where(rows.present, 0.3, 0.0), dtype=torch.float32) if with_tail else None,
        )

    def gradients(self, loss: torch.Tensor) -> list[torch.Tensor]:
        inputs = [self.hidden, *self.head.parameters()]
        found = torch.autograd.grad(loss, inputs, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


@pytest.mark.parametrize("with_tail", [False, True])
@pytest.mark.parametrize("lambda_", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("chunk_positions", [1, 4, 100])
def test_loss_and_gradients_agree_with_dense_targets(with_tail, lambda_, chunk_positions):
    setting = Setting(with_tail=with_tail)
    weight, bias = setting.head.weight, setting.head.bias
    clm, fusion = loss_sums(
        setting.hidden, setting.head, setting.labels, setting.targets, chunk_positions=chunk_positions
    )
    logits = nn.functional.linear(setting.hidden.double(), weight.double(), bias.double())
    expected_clm, expected_fusion = dense_sums(logits, setting.labels, setting.targets)
    assert clm.item() == pytest.approx(expected_clm.item(), rel=1e-5)
    assert fusion.item() == pytest.approx(expected_fusion.item(), rel=1e-5)
    found = setting.gradients(lambda_ * clm + (1 - lambda_) * fusion)
    expected = setting.gradients(lambda_ * expected_clm + (1 - lambda_) * expected_fusion)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def dense_sums(logits, labels, targets) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sums with dense logits and dense targets, written as the definition reads."""
    logprobs = logits.log_softmax(dim=1)
    clm, fusion = logits.new_zeros(()), logits.new_zeros(())
    for row, label in enumerate(labels.tolist()):
        if label != IGNORED:
            clm = clm - logprobs[row, label]
        listed = {
            token: prob
            for token, prob in zip(targets.ids[row].tolist(), targets.probs[row].tolist(), strict=True)
            if token != PAD_ID
        }
        for token, prob in listed.items():
            fusion = fusion - prob * logprobs[row, token]
        if listed and targets.tail_mass is not None:
            outside = [token for token in range(logits.shape[1]) if token not in listed]
            fusion = fusion - targets.tail_mass[row].item() * logprobs[row, outside].exp().sum().log()
    return clm, fusion


def test_without_targets_the_loss_is_plain_cross_entropy():
    setting = Setting(with_tail=False)
    clm, fusion = loss_sums(setting.hidden, setting.head, setting.labels, None, chunk_positions=100)
    labelled = setting.labels != IGNORED
    expected = nn.functional.cross_entropy(
        setting.head(setting.hidden[labelled]), setting.labels[labelled], reduction="sum"
    )
    assert fusion.item() == 0
    torch.testing.assert_close(clm, expected, rtol=1e-6, atol=0)
    for one, other in zip(setting.gradients(clm), setting.gradients(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_positions_without_label_and_distribution_never_reach_the_head():
    seen = []

    def head(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        return hidden @ torch.eye(H)

    targets = SparseTargets(torch.full((P, 2), PAD_ID), torch.zeros(P, 2), None)
    targets.ids[0, 0], targets.probs[0, 0] = 4, 1.0
    labels = torch.full((P,), IGNORED)
    labels[5] = 2
    loss_sums(torch.randn(P, H), head, labels, targets, chunk_positions=100)
    assert seen == [2]


def test_nothing_to_count_is_a_loss_of_zero():
    labels = torch.full((P,), IGNORED)
    clm, fusion = loss_sums(torch.randn(P, H), nn.Linear(H, V), labels, None, chunk_positions=4)
    assert (clm.item(), fusion.item()) == (0.0, 0.0)


@given(st.floats(-40, math.log1p(-1e-3)))
@settings(deadline=None)
def test_log_rest_is_ln_of_one_minus(log_mass):
    value = torch.tensor(log_mass, requires_grad=True)
    found = log_rest(value)
    assert found.item() == pytest.approx(math.log1p(-math.exp(value.item())), rel=1e-3, abs=1e-12)
    (gradient,) = torch.autograd.grad(found, value)
    assert gradient.item() == pytest.approx(-1 / math.expm1(-value.item()), rel=2e-3)


@pytest.mark.parametrize("log_mass", [0.0, 1e-6, -1e-9, -torch.inf])
def test_log_rest_is_finite_where_rounding_leaves_nothing(log_mass):
    value = torch.tensor(log_mass, requires_grad=True)
    found = log_rest(value)
    (gradient,) = torch.autograd.grad(found, value)
    assert found.item() == pytest.approx(math.log(REST_EPSILON) if log_mass > -1 else 0.0, abs=1e-2)
    assert math.isfinite(gradient.item())


def test_a_model_sure_of_the_row_gives_a_finite_tail_loss_and_gradient():
    hidden = torch.zeros(1, V)
    hidden[0, 2] = 200.0
    hidden.requires_grad_()
    targets = SparseTargets(torch.tensor([[2]]), torch.tensor([[0.9]]), torch.tensor([0.1]))
    _, fusion = loss_sums(hidden, lambda x: x, torch.tensor([IGNORED]), targets, chunk_positions=1)
    fusion.backward()
    assert fusion.item() == pytest.approx(-0.1 * math.log(REST_EPSILON), rel=1e-2)
    assert torch.isfinite(hidden.grad).all()
