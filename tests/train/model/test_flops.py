import pytest
import torch

from tests.train.model.test_architecture import real_model, tiny_config
from train.config import LoraConfig, TrainConfig
from train.model.flops import ModelFlops, peak_flops


@pytest.mark.parametrize("tied", [True, False])
def test_operations_are_those_that_torch_counts(tied):
    from torch.utils.flop_counter import FlopCounterMode

    model = real_model(tiny_config(tie_word_embeddings=tied))
    model.set_attn_implementation("eager")
    ids = torch.zeros((2, 48), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    assert ModelFlops.of(model).of_tokens(96, 2) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_frozen_weights_need_no_gradient_of_their_own():
    plain = ModelFlops.of(real_model(tiny_config()))
    adapted = ModelFlops.of(real_model(tiny_config(), LoraConfig(r=1)))
    assert 4 / 6 * plain.per_token < adapted.per_token < 0.8 * plain.per_token


def test_operations_of_a_model_without_attention_are_not_known():
    from transformers import AutoConfig

    config = AutoConfig.for_model("mamba", vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    assert ModelFlops.of(real_model(config)) is None


def test_the_peak_of_a_cpu_is_unknown_unless_it_is_configured():
    assert peak_flops(TrainConfig(), torch.device("cpu")) is None
    assert peak_flops(TrainConfig(peak_tflops=100), torch.device("cpu")) == 1e14
