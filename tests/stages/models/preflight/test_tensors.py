"""Checkpoints that lack tensors are refused, and no sound one of any architecture is."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from stages.models.config import ModelConfig, load_model
from tests.stages.models.preflight.spoil import change_weights, edit_json, messages, problems
from tests.tiny_models import Architecture, save_model, split_weights
from tests.tiny_tokenizers import save_tokenizer

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
OTHERS: dict[str, dict[str, Any]] = {
    "qwen3": {**SHAPE, "head_dim": 16},
    "mixtral": {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**SHAPE, **EXPERTS, "head_dim": 16, "num_experts": 4},
    "qwen2_moe": {**SHAPE, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24},
    "gpt_oss": {**SHAPE, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {**SHAPE, **EXPERTS, **LATENT, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "phi3": SHAPE,
    "olmo2": SHAPE,
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 400},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 400},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "vocab_size": 400},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 400},
    "jamba": {**SHAPE, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1},
}


def save_other(folder: Path, architecture: str, auto: Any = AutoModelForCausalLM, **changes: Any) -> Path:
    """Save a tiny model as transformers does, with a tokenizer."""
    config = AutoConfig.for_model(architecture, **{**OTHERS[architecture], **changes})
    auto.from_config(config, dtype=torch.float32).save_pretrained(folder)
    save_tokenizer("byte-bpe", folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    return folder


@pytest.mark.parametrize("architecture", [name for name in get_args(Architecture) if name != "qwen2"])
def test_sound_models_are_accepted(tmp_path: Path, architecture: Architecture) -> None:
    assert problems(save_model(tmp_path / "model", architecture=architecture, vocab_padding=3)) == []


@pytest.mark.parametrize("architecture", OTHERS)
def test_sound_models_whose_tensors_are_renamed_or_stacked_are_accepted(tmp_path: Path, architecture: str) -> None:
    assert problems(save_other(tmp_path / "model", architecture)) == []


@pytest.mark.parametrize("architecture", ["llama", "mpt", "gpt2", "gemma3"])
def test_a_body_saved_with_its_head_tied_or_without_prefix_is_accepted(
    tmp_path: Path, architecture: Architecture
) -> None:
    """Some checkpoints hold the names of the body alone; a tied head is in no file."""
    folder = save_model(tmp_path / "model", architecture=architecture)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    prefix = {"llama": "model.", "mpt": "transformer.", "gpt2": "transformer.", "gemma3": "model."}[architecture]
    change_weights(
        folder,
        lambda tensors: {
            name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name != "lm_head.weight"
        },
    )
    assert problems(folder) == []
    load_model(ModelConfig(name="m", path=folder), dtype="float32", attention=("eager",), device="cpu")


def test_weights_in_several_files_are_accepted(llama: Path) -> None:
    split_weights(llama)
    assert problems(llama) == []


def without_head(tensors: dict[str, Any]) -> None:
    del tensors["lm_head.weight"]


def test_a_missing_head_is_refused_with_what_to_do(llama: Path) -> None:
    change_weights(llama, without_head)
    (found,) = messages(llama)
    assert found == (
        f"model m: {llama}: the weights lack lm_head.weight; expected every tensor of LlamaForCausalLM: a missing "
        "tensor would be initialised at random. This is a body without LM head. A language model has one; if it "
        "shares the embedding's "
        'weights, set "tie_word_embeddings": true in config.json'
    )


def test_missing_tensors_are_refused_after_loading_too(llama: Path) -> None:
    """Where the preflight could not look: a model of the hub that was not in the cache yet."""
    change_weights(llama, without_head)
    with pytest.raises(
        ValueError, match=r"model m: the weights lack lm_head\.weight, which transformers initialised at random"
    ):
        load_model(ModelConfig(name="m", path=llama), dtype="float32", attention=("eager",), device="cpu")


def test_a_missing_tensor_inside_the_model_is_named(llama: Path) -> None:
    gone = ["model.layers.0.mlp.up_proj.weight", *(f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkvo")]
    change_weights(llama, lambda tensors: {name: tensors[name] for name in tensors if name not in gone})
    (found,) = messages(llama)
    assert "the weights lack model.layers.0.mlp.up_proj.weight, model.layers.1.self_attn.k_proj.weight" in found
    assert "and 2 more" in found
    assert "Fetch the weights again" in found


@pytest.mark.parametrize(
    ("prefix", "whose"),
    [
        ("_orig_mod.", "torch.compile"),
        ("module.", "DataParallel"),
        ("module._orig_mod.", "torch.compile"),
        ("base_model.model.", "PEFT"),
        ("_forward_module.", "Lightning"),
    ],
)
def test_names_with_a_wrapper_s_prefix_are_refused_and_the_wrapper_named(llama: Path, prefix: str, whose: str) -> None:
    change_weights(llama, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    (found,) = messages(llama)
    assert f"which {whose} adds: remove it" in found
    assert "and hold " in found


def test_a_wrapper_around_a_part_of_the_model_is_named(llama: Path) -> None:
    change_weights(
        llama,
        lambda tensors: {name.replace("layers.0.", "layers.0._orig_mod."): value for name, value in tensors.items()},
    )
    (found,) = messages(llama)
    assert "torch.compile" in found


def test_a_classifier_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = save_other(tmp_path / "model", "qwen3", AutoModelForSequenceClassification)
    (found,) = messages(folder)
    assert "the weights lack lm_head.weight, and hold score.weight that it has no place for" in found
    assert "They belong to Qwen3ForSequenceClassification" in found


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_a_missing_expert_is_refused(tmp_path: Path, architecture: str) -> None:
    """The experts of a layer are stacked as they are loaded."""
    folder = save_other(tmp_path / "model", architecture)
    change_weights(
        folder,
        lambda tensors: {
            name: value for name, value in tensors.items() if ".1." not in name or "experts.3" not in name
        },
    )
    (found,) = messages(folder)
    assert "experts" in found


def test_layers_that_the_configuration_does_not_count_are_refused(llama: Path) -> None:
    edit_json(llama / "config.json", num_hidden_layers=1)
    (found,) = messages(llama)
    assert "the weights have more layers than config.json says: model.layers.1.input_layernorm.weight" in found


def test_tensors_that_nothing_wants_are_no_problem(llama: Path) -> None:
    """A value head of reinforcement learning, say."""
    change_weights(llama, lambda tensors: {**tensors, "v_head.summary.weight": torch.zeros(1, 64)})
    assert problems(llama) == []


def test_weights_of_another_shape_are_refused(llama: Path) -> None:
    edit_json(llama / "config.json", vocab_size=390)
    found = messages(llama)
    assert any("has shape [400, 64], and 1 more; expected [390, 64], as config.json says" in text for text in found)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_packed_weights_without_their_configuration_are_refused(llama: Path, dtype: torch.dtype) -> None:
    """transformers would take the packed numbers for the weights."""
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(llama, lambda tensors: {**tensors, name: tensors[name].to(dtype)})
    (found,) = messages(llama)
    assert f"{name} holds packed numbers" in found
