import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.models.heads import check_head, split_head
from tests.train.dense_loss import loss_settings
from train.config import LoraConfig, TrainConfig
from train.model.lora import add_adapters, merge_adapters
from train.objective.loss import fused_loss
from train.optimizer import build_optimizer

IDS = torch.arange(20).reshape(2, 10)
LORA = LoraConfig(r=4, alpha=8)


def plain_model(architecture: str, *, tied: bool):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if architecture == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = AutoConfig.for_model(
        architecture, vocab_size=23, **sizes, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2
    )
    return AutoModelForCausalLM.from_config(config)


def train_a_little(model, steps: int = 3) -> None:
    optimizer = build_optimizer(model, TrainConfig(learning_rate=1e-2))
    body, head = split_head(model)
    for _ in range(steps):
        optimizer.zero_grad()
        hidden = body(IDS % 23).flatten(0, 1)
        fused_loss(hidden, head, (IDS % 23).flatten().roll(-1), None, loss_settings(1.0, 0.0)).total.backward()
        optimizer.step()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_only_adapters_are_trained_and_the_merged_model_gives_the_same_logits(architecture, tied):
    model = plain_model(architecture, tied=tied)
    original = copy.deepcopy(model.state_dict())
    fresh = copy.deepcopy(model)
    adapted = add_adapters(model, LORA)
    assert type(adapted) is type(fresh)
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == {
        name for name, _ in adapted.named_parameters() if ".lora_" in name
    }
    check_head(adapted)
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted.train()
    train_a_little(adapted)
    merged = merge_adapters(adapted, adapted.state_dict())
    assert merged.keys() == original.keys()
    changed = {name for name in merged if not torch.equal(merged[name], original[name])}
    assert changed
    assert all("attn" in name or "mlp" in name for name in changed)
    fresh.load_state_dict(merged)
    adapted.eval(), fresh.eval()
    torch.testing.assert_close(fresh(input_ids=IDS % 23).logits, adapted(input_ids=IDS % 23).logits)


def test_merged_weights_are_peft_s_own():
    import peft

    model = plain_model("llama", tied=True)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, settings)
    base = wrapped.get_base_model()
    train_a_little(base)
    found = merge_adapters(base, copy.deepcopy(base.state_dict()))
    expected = wrapped.merge_and_unload().state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_only_named_layers_get_adapters():
    adapted = add_adapters(plain_model("llama", tied=True), LoraConfig(r=2, target_modules=("q_proj", "v_proj")))
    layers = {name.split(".lora_")[0].rsplit(".", 1)[1] for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert layers == {"q_proj", "v_proj"}


def test_checkpointing_does_not_change_the_gradients_of_adapters():
    gradients = []
    for checkpointing in (False, True):
        adapted = add_adapters(plain_model("llama", tied=True), LORA).train()
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        if checkpointing:
            adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        body, head = split_head(adapted)
        labels = (IDS % 23).flatten().roll(-1)
        torch.manual_seed(2)
        fused_loss(body(IDS % 23).flatten(0, 1), head, labels, None, loss_settings(1.0, 0.0)).total.backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    # lora_A is drawn at random when the adapters are made, with the same seed both times
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize(
    ("targets", "message"),
    [(("no_such_layer",), "does not fit"), (("lm_head",), "LM head"), (("embed_tokens",), "head")],
)
def test_layers_that_cannot_have_adapters_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        add_adapters(plain_model("llama", tied=False), LoraConfig(target_modules=targets))
