import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.contract.columns import PAD_ID
from tests.train.dense_loss import row_loss
from train.objective.divergence import SparseTargets, asks_for_rest, fusion_losses


@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.integers(1, 5),
    temperature=st.floats(0.5, 4),
    with_tail=st.booleans(),
    divergence=st.sampled_from(["forward-kl", "reverse-kl"]),
)
@settings(max_examples=60)
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
        outcomes = logprobs[rows.ids.clamp(min=0)]
        if asks_for_rest(rows, divergence, temperature):
            outcomes = torch.cat([outcomes, torch.tensor([[np.log(np.delete(q, ids).sum())]])], dim=1)
        found = fusion_losses(outcomes, rows, divergence, temperature).item()
        listed = dict(zip(ids.tolist(), rows.probs[0].double().tolist(), strict=False))
        expected = row_loss(logprobs, listed, tail, divergence, temperature)
        assert found == pytest.approx(float(expected), rel=1e-6, abs=1e-6)
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
    logprobs = torch.log(torch.tensor([[0.5, 0.1, 0.4]])).requires_grad_()
    loss = fusion_losses(logprobs, rows, divergence, temperature)
    assert math.isfinite(loss.item())
    assert torch.isfinite(torch.autograd.grad(loss.sum(), logprobs)[0]).all()
