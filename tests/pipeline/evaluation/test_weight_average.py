"""The average of weights against torch's own mean of state dicts, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.evaluation.weight_average import average_weights
from pipeline.settings.baselines import AverageRefusedError
from stages.models.config import ModelConfig, load_model
from tests.tiny_models import save_model
from tests.tiny_tokenizers import TEXTS
from train.config import EvalConfig
from train.evaluate import Segment, bits_per_byte

SEGMENTS = [Segment(0, TEXTS[0], is_last=True), Segment(1, TEXTS[3], is_last=True)]
CONFIG = EvalConfig(dtype="float32", device="cpu")


def saved(folder: Path, name: str, **settings) -> ModelConfig:
    return ModelConfig(name=name, path=save_model(folder / name, **settings))


def state(model: ModelConfig) -> dict[str, torch.Tensor]:
    return load_model(model, dtype="float32", attention=("eager",), device="cpu").state_dict()


@pytest.mark.parametrize(
    ("architecture", "family"), [("llama", "spm-bpe"), ("gemma3", "unigram"), ("gpt_neox", "byte-bpe")]
)
def test_the_average_is_the_mean_of_the_state_dicts(tmp_path: Path, architecture, family) -> None:
    models = [
        saved(tmp_path, name, architecture=architecture, tokenizer_family=family, seed=seed)
        for seed, name in enumerate(("one", "two", "three"))
    ]
    weights = (0.5, 0.3, 0.2)
    found = state(average_weights(models, weights, tmp_path / "average"))
    states = [state(model) for model in models]
    assert found.keys() == states[0].keys()
    for name, tensor in found.items():
        expected = sum(weight * part[name].double() for weight, part in zip(weights, states, strict=True))
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)


def test_the_average_of_a_model_with_itself_is_the_model(tmp_path: Path) -> None:
    model = saved(tmp_path, "one")
    average = average_weights([model, model], (0.5, 0.5), tmp_path / "average")
    for name, tensor in state(average).items():
        assert torch.equal(tensor, state(model)[name])
    own, found = (bits_per_byte(each, SEGMENTS, CONFIG).bits_per_byte for each in (model, average))
    assert found == own


def test_half_precision_keeps_its_type_and_is_summed_in_float32(tmp_path: Path) -> None:
    models = [saved(tmp_path, name, seed=seed) for seed, name in enumerate(("one", "two"))]
    for model in models:
        file = Path(str(model.path)) / "model.safetensors"
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    average_weights(models, (0.5, 0.5), tmp_path / "average")
    found = {}
    for file in (tmp_path / "average").glob("*.safetensors"):
        found |= load_file(file)
    one, two = (load_file(Path(str(model.path)) / "model.safetensors") for model in models)
    assert found.keys() == one.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, ((one[name].float() + two[name].float()) / 2).bfloat16())


def test_a_tied_output_layer_that_one_file_holds_too_is_left_out(tmp_path: Path) -> None:
    models = [
        saved(tmp_path, name, architecture="gemma3", tokenizer_family="unigram", seed=seed)
        for seed, name in enumerate(("one", "two"))
    ]
    before = state(average_weights(models, (0.5, 0.5), tmp_path / "average"))
    file = tmp_path / "two" / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    after = state(average_weights(models, (0.5, 0.5), tmp_path / "average"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"architecture": "gpt_neox", "tokenizer_family": "byte-bpe"}, "architectures: model_type llama against gpt_neox"),
        ({"settings": {"hidden_size": 32, "num_attention_heads": 4}}, "hidden_size 64 against 32"),
        ({"settings": {"rms_norm_eps": 1e-3}}, "rms_norm_eps 1e-06 against 0.001"),
        ({"vocab_size": 390}, "different vocabularies: 400 tokens against 390"),
        ({"vocab_padding": 8}, r"shape \(408, 64\) in two|shape \(400, 64\) in one, \(408, 64\) in two"),
    ],
)  # fmt: skip
def test_models_that_differ_are_refused_with_the_reason(tmp_path: Path, settings, reason: str) -> None:
    models = [saved(tmp_path, "one"), saved(tmp_path, "two", **settings)]
    with pytest.raises(AverageRefusedError, match=reason):
        average_weights(models, (0.5, 0.5), tmp_path / "average")
    assert not (tmp_path / "average").exists()


def test_quantized_models_are_refused(tmp_path: Path) -> None:
    models = [saved(tmp_path, "one"), saved(tmp_path, "two", seed=1)]
    file = tmp_path / "two" / "config.json"
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": quantization}))
    with pytest.raises(AverageRefusedError, match="two is quantized"):
        average_weights(models, (0.5, 0.5), tmp_path / "average")


def test_a_vocabulary_of_the_same_size_with_other_tokens_is_refused(tmp_path: Path) -> None:
    models = [saved(tmp_path, "one"), saved(tmp_path, "two")]
    file = tmp_path / "two" / "tokenizer.json"
    description = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = description["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(AverageRefusedError, match=r"2 of 400 ids, the first 398: '.+' against '.+'"):
        average_weights(models, (0.5, 0.5), tmp_path / "average")


def test_a_longer_table_of_dropped_out_and_length_settings_is_no_other_architecture(tmp_path: Path) -> None:
    models = [saved(tmp_path, "one"), saved(tmp_path, "two", seed=5, max_positions=512, settings={"pretraining_tp": 2})]
    average = average_weights(models, (0.5, 0.5), tmp_path / "average")
    assert np.isfinite(bits_per_byte(average, SEGMENTS, CONFIG).bits_per_byte)
