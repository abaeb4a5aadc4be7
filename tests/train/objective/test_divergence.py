import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.contract.columns import PAD_ID
from tests.train.dense_loss import row_loss
from train.objective.divergence import REST_EPSILON, SparseTargets, fusion_losses, log_rest


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


@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.integers(1, 5),
    temperature=st.floats(0.5, 4),
    with_tail=st.booleans(),
    divergence=st.sampled_from(["forward-kl", "reverse-kl"]),
)
@settings(deadline=None, max_examples=60)
def test_losses_are_their_definition_and_least_at_the_fused_distribution(
    seed, width, temperature, with_tail, divergence
):
    rng = np.random.default_rng(seed)
    vocabulary = 8
    mass = 0.8 if with_tail else 1.0
    probs = rng.dirichlet(np.full(width, 2.0)) * mass
    ids = rng.choice(vocabulary, width, replace=False)
    tail = 0.2 if with_tail else None
    rows = SparseTargets(
        torch.tensor(np.append(ids, PAD_ID))[None],
        torch.tensor(np.append(probs, 0.0), dtype=torch.float32)[None],
        torch.tensor([0.2]) if with_tail else None,
    )

    def loss(q: np.ndarray) -> float:
        logprobs = torch.tensor(np.log(q))
        found = fusion_losses(logprobs.float()[rows.ids.clamp(min=0)], rows, divergence, temperature).item()
        listed = dict(zip(ids.tolist(), rows.probs[0].double().tolist(), strict=False))
        expected = row_loss(logprobs, listed, tail, divergence, temperature)
        assert found == pytest.approx(float(expected), rel=1e-3, abs=1e-3)
        return found

    # Mass that a rescaled row leaves nothing for is little, but not none, so that every logarithm is finite.
    rest = (tail or 1e-4) / (vocabulary - width)
    best = np.full(vocabulary, rest)
    best[ids] = probs * (1 if with_tail else 1 - 1e-4)
    other = rng.dirichlet(np.full(vocabulary, 1.0)) * 0.9 + 0.1 / vocabulary
    assert loss(best) <= loss(other) + 2e-3 * temperature**2


def test_a_reverse_row_of_one_id_without_tail_says_nothing():
    rows = SparseTargets(torch.tensor([[3]]), torch.tensor([[1.0]]), None)
    logprobs = torch.tensor([[-4.0]], requires_grad=True)
    loss = fusion_losses(logprobs, rows, "reverse-kl", 1.0)
    assert loss.item() == 0
    assert torch.autograd.grad(loss.sum(), logprobs)[0].item() == 0


@pytest.mark.parametrize("divergence", ["forward-kl", "reverse-kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_probabilities_and_tails_that_were_rounded_to_zero_stay_finite(divergence, temperature):
    rows = SparseTargets(torch.tensor([[3, 5]]), torch.tensor([[1.0, 0.0]]), torch.tensor([0.0]))
    logprobs = torch.log(torch.tensor([[0.5, 0.1]])).requires_grad_()
    loss = fusion_losses(logprobs, rows, divergence, temperature)
    assert math.isfinite(loss.item())
    assert torch.isfinite(torch.autograd.grad(loss.sum(), logprobs)[0]).all()
