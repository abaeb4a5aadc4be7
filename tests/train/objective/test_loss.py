import math

import numpy as np
import pytest
import torch
from torch import nn

from stages.contract.columns import PAD_ID
from stages.models.heads import split_head
from tests.train.dense_loss import dense_sums, loss_settings
from tests.train.fused_files import random_rows
from train.objective import loss
from train.objective.divergence import SparseTargets
from train.objective.loss import BLOCK, IGNORED, LossSettings, block_positions, fused_loss

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
        self.targets = random_targets(rng, P, V, with_tail=with_tail)

    def gradients(self, loss: torch.Tensor) -> list[torch.Tensor]:
        inputs = [self.hidden, *self.head.parameters()]
        found = torch.autograd.grad(loss, inputs, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def random_targets(rng, length: int, size: int, *, with_tail: bool) -> SparseTargets:
    rows = random_rows(rng, length, size, mass=0.7 if with_tail else 1.0, empty=0.3)
    return SparseTargets(
        ids=torch.tensor(rows.ids, dtype=torch.int64),
        probs=torch.tensor(np.exp(rows.logprobs)),
        tail_mass=torch.tensor(np.where(rows.present, 0.3, 0.0), dtype=torch.float32) if with_tail else None,
    )


@pytest.mark.parametrize("divergence", ["forward-kl", "reverse-kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.7])
@pytest.mark.parametrize("with_tail", [False, True])
@pytest.mark.parametrize(("clm_factor", "fusion_factor"), [(0.0, 1.0), (0.8, 0.2), (1.0, 0.0)])
@pytest.mark.parametrize("chunk_positions", [1, 4, 100])
def test_loss_and_gradients_agree_with_dense_targets(
    divergence, temperature, with_tail, clm_factor, fusion_factor, chunk_positions
):
    setting = Setting(with_tail=with_tail)
    settings = loss_settings(clm_factor, fusion_factor, divergence, temperature, chunk_positions)
    found = fused_loss(setting.hidden, setting.head, setting.labels, setting.targets, settings)
    weight, bias = setting.head.weight.double(), setting.head.bias.double()
    logits = nn.functional.linear(setting.hidden.double(), weight, bias)
    clm, fusion = dense_sums(logits, setting.labels, setting.targets, divergence, temperature)
    assert found.clm.item() == pytest.approx(clm.item(), rel=1e-5)
    assert found.fusion.item() == pytest.approx(fusion.item(), rel=1e-5)
    total = clm_factor * clm + fusion_factor * fusion
    assert found.total.item() == pytest.approx(total.item(), rel=1e-5)
    for one, other in zip(setting.gradients(found.total), setting.gradients(total), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_tail", [False, True])
@pytest.mark.parametrize("chunk_positions", [1, 4, 100])
def test_the_gold_token_stands_for_the_tail_where_the_row_does_not_list_it(with_tail, chunk_positions):
    setting = Setting(with_tail=with_tail)
    settings = loss_settings(0.3, 0.7, chunk_positions=chunk_positions, tail_loss="gold")
    found = fused_loss(setting.hidden, setting.head, setting.labels, setting.targets, settings)
    logprobs = setting.head(setting.hidden).double().log_softmax(dim=1)
    clm, fusion = logprobs.new_zeros(()), logprobs.new_zeros(())
    num_outside = 0
    for row, label in enumerate(setting.labels.tolist()):
        clm = clm - (logprobs[row, label] if label != IGNORED else 0)
        ids = [token for token in setting.targets.ids[row].tolist() if token != PAD_ID]
        for token, prob in zip(ids, setting.targets.probs[row].tolist(), strict=False):
            fusion = fusion - prob * logprobs[row, token]
        if ids and label != IGNORED and label not in ids:
            fusion = fusion - logprobs[row, label]
            num_outside += 1
    assert num_outside > 1
    assert found.clm.item() == pytest.approx(clm.item(), rel=1e-5)
    assert found.fusion.item() == pytest.approx(fusion.item(), rel=1e-5)
    for one, other in zip(setting.gradients(found.total), setting.gradients(0.3 * clm + 0.7 * fusion), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_over_the_data_the_gold_tail_is_the_cross_entropy_of_the_whole_distribution():
    """Of a row with the data's own probabilities, whatever the model is: expected over the gold token, with its gradient."""
    torch.manual_seed(0)
    hidden, head = torch.randn(1, H, requires_grad=True), nn.Linear(H, V)
    data = torch.randn(V).double().softmax(dim=0)
    ids = data.argsort(descending=True)[:5]
    row = SparseTargets(ids[None], data[ids][None].float(), torch.tensor([1 - data[ids].sum()]).float())
    settings = loss_settings(0.0, 1.0, tail_loss="gold")
    expected = [
        prob * fused_loss(hidden, head, torch.tensor([gold]), row, settings).total
        for gold, prob in enumerate(data.tolist())
    ]
    found = torch.stack(expected).sum()
    whole = -(data * head(hidden)[0].double().log_softmax(dim=0)).sum()
    assert found.item() == pytest.approx(whole.item(), rel=1e-6)
    for one, other in zip(
        *(torch.autograd.grad(total, [hidden, *head.parameters()]) for total in (found, whole)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward-kl", "reverse-kl"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere", "granite", "phi"])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_whole_models_agree_with_dense_targets(divergence, architecture, tied):
    """Soft-capped (gemma2), scaled (cohere, granite) and biased (phi) heads; tied to the embeddings or not."""
    model = tiny_model(architecture, tied=tied)
    ids = torch.arange(2 * 9).reshape(2, 9) % V
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), IGNORED)], dim=1).flatten()
    targets = random_targets(np.random.default_rng(3), 18, V, with_tail=True)
    body, head = split_head(model)
    settings = loss_settings(0.4, 0.6, divergence, 1.5, chunk_positions=5)
    fused_loss(body(ids).flatten(0, 1), head, labels, targets, settings).total.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    clm, fusion = dense_sums(model(input_ids=ids).logits.flatten(0, 1).double(), labels, targets, divergence, 1.5)
    (0.4 * clm + 0.6 * fusion).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-5, msg=name)


def tiny_model(architecture: str, *, tied: bool):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    extra = {
        "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8, "query_pre_attn_scalar": 8},
        "cohere": {"logit_scale": 2.0},
        "granite": {"logits_scaling": 0.5},
    }
    config = AutoConfig.for_model(
        architecture, vocab_size=V, **sizes, **extra.get(architecture, {}), tie_word_embeddings=tied,
        pad_token_id=None, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    if architecture != "phi":
        config.num_key_value_heads = 2
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_positions_and_of_the_vocabulary_add_up(dtype, monkeypatch):
    """More positions than a block, more of the vocabulary than a slice of the weight's gradient; neither is a multiple."""
    monkeypatch.setattr("train.objective.loss.BLOCK", 4)
    monkeypatch.setattr("train.objective.loss._ROWS", 5)
    setting = Setting(with_tail=True)
    head = nn.Linear(H, V, dtype=dtype)
    hidden = setting.hidden.detach().to(dtype).requires_grad_()
    found = fused_loss(hidden, head, setting.labels, setting.targets, loss_settings(0.4, 0.6, chunk_positions=9))
    found.total.backward()
    exact = nn.functional.linear(hidden.detach().double(), head.weight.double(), head.bias.double())
    exact = exact.to(dtype).double().requires_grad_()  # as the head gives them, in its precision
    clm, fusion = dense_sums(exact, setting.labels, setting.targets, "forward-kl", 1.0)
    (of_logits,) = torch.autograd.grad(0.4 * clm + 0.6 * fusion, exact)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
    assert found.total.item() == pytest.approx((0.4 * clm + 0.6 * fusion).item(), rel=1e-5)
    wanted = (of_logits @ head.weight.double(), of_logits.T @ hidden.detach().double(), of_logits.sum(dim=0))
    for one, other in zip((hidden.grad, head.weight.grad, head.bias.grad), wanted, strict=True):
        torch.testing.assert_close(one.double(), other, **tolerance)


def test_a_chunk_of_a_gpu_is_one_block(monkeypatch):
    """As a GPU computes it, on the CPU: the same loss and gradients as in blocks."""
    assert (block_positions("cpu", 9), block_positions("cpu", 900), block_positions("cuda", 900)) == (9, BLOCK, 900)
    setting = Setting(with_tail=True)
    head = nn.Linear(H, V)

    def found(device):
        monkeypatch.setattr("train.objective.loss.BLOCK", 4)
        monkeypatch.setattr("train.objective.loss.block_positions", lambda _, chunk: block_positions(device, chunk))
        hidden = setting.hidden.detach().requires_grad_()
        loss = fused_loss(hidden, head, setting.labels, setting.targets, loss_settings(0.4, 0.6, chunk_positions=9))
        return loss.total, *torch.autograd.grad(loss.total, (hidden, head.weight))

    for in_blocks, whole in zip(found("cpu"), found("cuda"), strict=True):
        torch.testing.assert_close(in_blocks, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_keeps_near_float32(dtype):
    """Under autocast (float32 weights), and with weights in half precision, as FSDP2 gathers them."""
    setting = Setting(with_tail=True)
    settings = loss_settings(0.5, 0.5, chunk_positions=4)
    exact = fused_loss(setting.hidden, setting.head, setting.labels, setting.targets, settings)
    expected = setting.gradients(exact.total)
    setting.head.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fused_loss(setting.hidden.to(dtype), setting.head, setting.labels, setting.targets, settings)
    assert found.total.dtype == torch.float32
    assert found.total.item() == pytest.approx(exact.total.item(), rel=2e-2)
    for one, other in zip(setting.gradients(found.total), expected, strict=True):
        assert (one.float() - other).norm() < 2e-2 * other.norm()
    assert setting.gradients(fused_loss_again(setting, settings))[1].dtype == dtype


def fused_loss_again(setting: Setting, settings: LossSettings) -> torch.Tensor:
    hidden = setting.hidden.to(setting.head.weight.dtype)
    return fused_loss(hidden, setting.head, setting.labels, setting.targets, settings).total


def test_without_targets_the_loss_is_plain_cross_entropy():
    setting = Setting(with_tail=False)
    found = fused_loss(setting.hidden, setting.head, setting.labels, None, loss_settings(1.0, 0.0))
    labelled = setting.labels != IGNORED
    expected = nn.functional.cross_entropy(
        setting.head(setting.hidden[labelled]), setting.labels[labelled], reduction="sum"
    )
    assert found.fusion.item() == 0
    torch.testing.assert_close(found.total, expected, rtol=1e-6, atol=0)
    for one, other in zip(setting.gradients(found.total), setting.gradients(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


class CountingHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen: list[int] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(hidden))
        return hidden * 1.0


def test_positions_without_label_and_distribution_never_reach_the_head():
    head = CountingHead()
    targets = SparseTargets(torch.full((P, 2), PAD_ID), torch.zeros(P, 2), None)
    targets.ids[0, 0], targets.probs[0, 0] = 4, 1.0
    labels = torch.full((P,), IGNORED)
    labels[5] = 2
    fused_loss(torch.randn(P, H), head, labels, targets, loss_settings(0.5, 0.5, chunk_positions=100))
    assert head.seen == [2]


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_theirs():
    setting = Setting(with_tail=True)
    settings = loss_settings(0.5, 0.5, chunk_positions=4)
    arguments = (setting.head, setting.labels, setting.targets, settings)
    (expected,) = torch.autograd.grad(fused_loss(setting.hidden, *arguments).total, [setting.hidden])
    setting.head.requires_grad_(False)
    (found,) = torch.autograd.grad(fused_loss(setting.hidden, *arguments).total, [setting.hidden])
    torch.testing.assert_close(found, expected)


def test_a_trained_head_over_frozen_states_gets_its_gradient():
    setting = Setting(with_tail=True)
    settings = loss_settings(0.5, 0.5, chunk_positions=4)
    arguments = (setting.head, setting.labels, setting.targets, settings)
    weights = list(setting.head.parameters())
    expected = torch.autograd.grad(fused_loss(setting.hidden, *arguments).total, weights)
    found = torch.autograd.grad(fused_loss(setting.hidden.detach(), *arguments).total, weights)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_loss_is_scaled_as_any_other():
    setting = Setting(with_tail=True)
    settings = loss_settings(0.5, 0.5, chunk_positions=4)
    arguments = (setting.hidden, setting.head, setting.labels, setting.targets, settings)
    plain = setting.gradients(fused_loss(*arguments).total)
    scaled = setting.gradients(3 * fused_loss(*arguments).total)
    for one, other in zip(scaled, plain, strict=True):
        torch.testing.assert_close(one, 3 * other)


def test_a_second_backward_pass_is_refused():
    setting = Setting(with_tail=False)
    total = fused_loss(setting.hidden, setting.head, setting.labels, None, loss_settings(1.0, 0.0)).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        total.backward()


def test_without_gradients_only_the_sums_are_computed():
    setting = Setting(with_tail=True)
    settings = loss_settings(0.5, 0.5, chunk_positions=4)
    arguments = (setting.hidden, setting.head, setting.labels, setting.targets, settings)
    expected = fused_loss(*arguments)
    with torch.no_grad():
        found = fused_loss(*arguments)
    assert not found.total.requires_grad
    torch.testing.assert_close(found.total, expected.total.detach())


def test_nothing_to_count_is_a_zero_with_a_zero_gradient():
    setting = Setting(with_tail=False)
    labels = torch.full((P,), IGNORED)
    found = fused_loss(setting.hidden, setting.head, labels, None, loss_settings(0.0, 0.0))
    assert (found.total.item(), found.clm.item(), found.fusion.item()) == (0.0, 0.0, 0.0)
    assert all((gradient == 0).all() for gradient in setting.gradients(found.total))


def sure_logits(rest: float, dtype: torch.dtype) -> torch.Tensor:
    """Logits (2, V) of a model that leaves about ``rest`` outside the ids 2 and 5."""
    torch.manual_seed(5)
    logits = torch.randn(2, V)
    logits[:, [2, 5]] += math.log(2 / rest)
    return logits.to(dtype)


@pytest.mark.parametrize("divergence", ["forward-kl", "reverse-kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rest", [1e-3, 1e-7, 1e-12])
@pytest.mark.parametrize("clm_factor", [0.0, 0.5])
def test_a_model_that_leaves_the_rest_too_little_gets_the_exact_gradient(
    divergence, temperature, dtype, rest, clm_factor
):
    hidden = sure_logits(rest, dtype).requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    targets = SparseTargets(
        torch.tensor([[2, 5, PAD_ID], [5, PAD_ID, 2]]),
        torch.tensor([[0.6, 0.3, 0.0], [0.5, 0.0, 0.4]]),
        torch.tensor([0.1, 0.1]),
    )
    labels = torch.tensor([7, 0])  # neither is sure
    settings = loss_settings(clm_factor, 1.0, divergence, temperature)
    found = fused_loss(hidden, CountingHead(), labels, targets, settings)
    found.total.backward()
    clm, fusion = dense_sums(exact, labels, targets, divergence, temperature)
    (clm_factor * clm + fusion).backward()
    assert found.fusion.item() == pytest.approx(fusion.item(), rel=1e-5)
    assert exact.grad.abs().min() > 0
    rounding = 0.0 if dtype == torch.float32 else 2**-8  # the gradient has the precision of the head
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-3 + rounding, atol=0)


@pytest.mark.parametrize("divergence", ["forward-kl", "reverse-kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_model_that_rounds_the_rest_to_nothing_is_still_pulled_back(divergence, temperature):
    hidden = torch.zeros(1, V)
    hidden[0, 2] = 200.0
    hidden.requires_grad_()
    targets = SparseTargets(torch.tensor([[2]]), torch.tensor([[0.9]]), torch.tensor([0.1]))
    settings = loss_settings(0.0, 1.0, divergence, temperature)
    found = fused_loss(hidden, CountingHead(), torch.tensor([IGNORED]), targets, settings)
    found.total.backward()
    if temperature == 1:
        expected = 0.1 * (200 - math.log(V - 1)) if divergence == "forward-kl" else -math.log(0.9)
        assert found.fusion.item() == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(hidden.grad).all()
    if divergence == "forward-kl":
        others = hidden.grad[0, [token for token in range(V) if token != 2]]
        assert (others < 0).all()
        assert hidden.grad[0, 2].item() == pytest.approx(-others.sum().item(), rel=1e-5)


@pytest.mark.parametrize("divergence", ["forward-kl", "reverse-kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_row_that_lists_the_whole_vocabulary_has_no_rest(divergence, temperature):
    torch.manual_seed(2)
    hidden = torch.randn(1, 3, requires_grad=True)
    targets = SparseTargets(torch.tensor([[2, 0, 1]]), torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([0.0]))
    settings = loss_settings(0.5, 1.0, divergence, temperature)
    found = fused_loss(hidden, CountingHead(), torch.tensor([1]), targets, settings)
    found.total.backward()
    exact = hidden.detach().double().requires_grad_()
    logprobs = exact.log_softmax(dim=1)
    probs = torch.tensor([[0.3, 0.2, 0.5]], dtype=torch.float64)
    model = (logprobs / temperature).log_softmax(dim=1)
    fused = (probs.log() / temperature).log_softmax(dim=1)
    losses = -(fused.exp() * model) if divergence == "forward-kl" else model.exp() * (model - fused)
    (-0.5 * logprobs[0, 1] + temperature**2 * losses.sum()).backward()
    assert torch.isfinite(found.total)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_the_rest_is_computed_only_where_it_is_asked_for(monkeypatch):
    asked: list[bool] = []
    others = loss._others

    def counted(logits: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
        asked.append(ids is not None)
        return others(logits, ids)

    monkeypatch.setattr(loss, "_others", counted)
    for divergence, temperature, with_tail, expected in (
        ("forward-kl", 1.0, False, False),
        ("reverse-kl", 2.0, False, False),
        ("forward-kl", 2.0, False, True),
        ("forward-kl", 1.0, True, True),
        ("reverse-kl", 1.0, True, True),
    ):
        asked.clear()
        setting = Setting(with_tail=with_tail)
        settings = loss_settings(0.5, 0.5, divergence, temperature)
        fused_loss(setting.hidden, setting.head, setting.labels, setting.targets, settings)
        assert set(asked) == {expected}
