"""The sharded model against the plain one, on one worker; on two, see test_workers."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from stages.models.config import ModelConfig, empty_model, load_model
from stages.models.heads import split_head
from tests.tiny_models import ARCHITECTURES, save_model
from tests.train.conftest import make_config
from train.data.blocks import MicroBatch
from train.data.feed import empty_micro_batch
from train.distributed import join_workers
from train.model.architecture import decoder_layers
from train.model.parallel import LossModel, fill_parameters, full_state, shard_model
from train.objective.loss import IGNORED

FAMILY = {"gemma3": "unigram", "gpt_neox": "byte-bpe", "mpt": "byte-bpe", "qwen2": "byte-bpe", "gpt2": "byte-bpe"}
FACTORS = {"clm_factor": 0.01, "fusion_factor": 0.0}


@pytest.fixture
def alone():
    with join_workers(torch.device("cpu")) as workers:
        yield workers


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request, tmp_path_factory) -> ModelConfig:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    family = FAMILY.get(request.param, "spm-bpe")
    return ModelConfig(name="tiny", path=save_model(folder, architecture=request.param, tokenizer_family=family))


def batch() -> MicroBatch:
    ids = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), IGNORED)], dim=1)
    return MicroBatch(ids, labels, None, num_tokens=48)


def sharded(model: ModelConfig, workers, **settings) -> LossModel:
    config = make_config(**settings)
    loaded = load_model(model, dtype="float32", attention=("sdpa", "eager"), device="cpu")
    root = shard_model(empty_model(model, attention=("sdpa", "eager")), config, workers)
    fill_parameters(root, loaded, workers)
    return root


def plain(model: ModelConfig) -> torch.nn.Module:
    return load_model(model, dtype="float32", attention=("sdpa", "eager"), device="cpu").train()


def plain_loss(model: torch.nn.Module) -> torch.Tensor:
    body, head = split_head(model)
    logits = head(body(batch().ids)).flatten(0, 1)
    clm = torch.nn.functional.cross_entropy(logits, batch().labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return FACTORS["clm_factor"] * clm


@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_are_the_plain_models(model, alone, recompute):
    expected = plain(model)
    torch.manual_seed(0)
    wanted = plain_loss(expected)
    wanted.backward()
    root = sharded(model, alone, gradient_checkpointing=recompute)
    torch.manual_seed(0)  # some architectures have dropout
    total, clm, fusion = root(batch(), **FACTORS)
    total.backward()
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert (clm.item() * FACTORS["clm_factor"], fusion.item()) == (pytest.approx(total.item(), rel=1e-5), 0.0)
    gradients = dict(expected.named_parameters())
    for name, parameter in root.model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_bfloat16_stays_near_float32_and_keeps_float32_weights(model, alone):
    wanted = plain_loss(plain(model).eval())
    root = sharded(model, alone, autocast="bfloat16").eval()
    total, _, _ = root(batch(), **FACTORS)
    total.backward()
    assert total.item() == pytest.approx(wanted.item(), rel=2e-2)
    assert total.dtype == torch.float32
    for name, parameter in root.model.named_parameters():
        assert (parameter.dtype, parameter.grad.dtype) == (torch.float32, torch.float32), name


def test_every_decoder_layer_is_a_unit_and_weights_survive(model, alone):
    root = sharded(model, alone)
    layers = decoder_layers(root.model)
    assert len(layers) == 2
    assert all(isinstance(layer, FSDPModule) for layer in layers)
    gathered = full_state(root.model)
    for name, value in plain(model).state_dict().items():
        assert torch.equal(gathered[name], value), name


def test_a_batch_that_counts_nothing_gives_zero_gradients(alone, tiny_model):
    root = sharded(tiny_model, alone)
    total, clm, fusion = root(empty_micro_batch(), clm_factor=1.0, fusion_factor=1.0)
    total.backward()
    assert (total.item(), clm.item(), fusion.item()) == (0.0, 0.0, 0.0)
    for name, parameter in root.model.named_parameters():
        assert not parameter.grad.full_tensor().any(), name


def test_a_model_without_a_list_of_layers_is_one_unit(alone, tiny_model):
    root = sharded(tiny_model, alone)
    root.model.config.num_hidden_layers = 7
    assert decoder_layers(root.model) == []
