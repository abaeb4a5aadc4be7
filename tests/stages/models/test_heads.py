import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from stages.models.heads import check_head, split_head, takes_position_ids

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SETTINGS = {
    "llama": SHAPE,
    "gpt_neox": SHAPE,
    "gemma2": {**SHAPE, "head_dim": 8, "final_logit_softcapping": 0.05},
    "gemma3_text": {**SHAPE, "head_dim": 8},
    "cohere": {**SHAPE, "logit_scale": 3.0},
    "granite": {**SHAPE, "logits_scaling": 7.0},
    "mpt": {"vocab_size": 50, "d_model": 16, "n_layers": 1, "n_heads": 2},
    "opt": {
        "vocab_size": 50,
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 8,
        "dropout": 0.0,
        "max_position_embeddings": 32,
    },
    "gpt2": {
        "vocab_size": 50,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
        "attn_pdrop": 0,
    },
    "mixtral": {**SHAPE, "num_local_experts": 2},
    "mamba": {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def tiny(architecture: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **SETTINGS[architecture]))


@pytest.mark.parametrize("architecture", SETTINGS)
def test_halves_give_the_models_logits_and_gradients(architecture):
    model = tiny(architecture)
    check_head(model)
    body, head = split_head(model)
    logits = head(body(IDS)[0])
    expected = model(input_ids=IDS, use_cache=False).logits[0]
    torch.testing.assert_close(logits, expected)
    logits.logsumexp(-1).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    expected.logsumexp(-1).sum().backward()
    reference = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found.keys() == reference.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, reference[name])


def test_the_model_itself_is_left_as_it_was():
    model = tiny("llama").train()
    body, head = split_head(model)
    head(body(IDS))
    check_head(model)
    assert model.training
    assert type(model.model).__name__ == "LlamaModel"
    assert model(input_ids=IDS).logits.shape == (1, 8, 50)


def test_parameters_stay_shared():
    model = tiny("llama")
    _, head = split_head(model)
    before = head(torch.ones(2, 16))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    torch.testing.assert_close(head(torch.ones(2, 16)), 2 * before)


class Unusual(nn.Module):
    """A model whose forward does something with the body's output that the halves do not see."""

    base_model_prefix = "model"

    def __init__(self):
        super().__init__()
        self.whole = tiny("llama")
        self.model = self.whole.model
        self.lm_head = self.whole.lm_head

    def get_input_embeddings(self):
        return self.whole.get_input_embeddings()

    def forward(self, input_ids=None, inputs_embeds=None, use_cache=False):
        output = self.whole(input_ids=input_ids, inputs_embeds=inputs_embeds, use_cache=use_cache)
        output.logits = output.logits + 1
        return output


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="does not support the way"):
        check_head(Unusual())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_sees_the_text_behind_a_token_is_refused(dtype):
    config = AutoConfig.for_model("llama", **SHAPE, is_causal=False, initializer_range=0.2)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="changing the last token changes the logits before it by up to"):
        check_head(AutoModelForCausalLM.from_config(config, dtype=dtype))


def test_an_encoder_with_a_head_is_refused():
    settings = {name: SHAPE[name] for name in SHAPE if name != "num_key_value_heads"}
    config = AutoConfig.for_model("bert", **settings, is_decoder=False, initializer_range=0.2)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="not a causal language model"):
        check_head(AutoModelForCausalLM.from_config(config))


def test_recurrent_models_take_no_positions():
    assert takes_position_ids(tiny("llama"))
    assert not takes_position_ids(tiny("mamba"))


def test_a_module_without_a_body_is_refused():
    with pytest.raises(ValueError, match="AutoModelForCausalLM"):
        split_head(nn.Linear(2, 2))
