"""What of a training is left in bfloat16."""

import pytest
import torch
from safetensors.torch import load_file

from stages.models.config import ModelConfig
from tests.tiny_models import save_model
from train.model.rounding import RoundingSurvival, count_changes, rounding_survival


def test_a_change_below_half_a_step_of_bfloat16_does_not_survive() -> None:
    before = torch.tensor([1.0, 1.0, 1.0, 2.0])
    after = torch.tensor([1.0, 1.0 + 2**-10, 1.0 + 2**-6, 2.5])
    assert count_changes(before, after) == RoundingSurvival(num_changed=3, num_surviving=2)


def test_all_tensors_of_a_model_count(tmp_path) -> None:
    folder = save_model(tmp_path, architecture="llama", tokenizer_family="spm-bpe")
    weights = load_file(folder / "model.safetensors")
    model = ModelConfig(name="m", path=folder)
    assert rounding_survival(model, weights) == RoundingSurvival(0, 0)
    assert rounding_survival(model, weights).share == 1.0
    name = "model.layers.0.self_attn.q_proj.weight"
    changed = {**weights, name: weights[name].bfloat16().float() * (1 + 2**-12)}
    found = rounding_survival(model, changed)
    assert found.num_changed > 0.9 * weights[name].numel()
    assert found.share == pytest.approx(0.0, abs=0.01)


def test_other_names_give_nothing_to_compare(tmp_path) -> None:
    folder = save_model(tmp_path, architecture="llama", tokenizer_family="spm-bpe")
    assert rounding_survival(ModelConfig(name="m", path=folder), {"other": torch.zeros(2)}) is None
