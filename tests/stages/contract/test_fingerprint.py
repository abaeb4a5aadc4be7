"""A fingerprint changes with what changes a result, and with nothing else."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from stages.align.config import AlignConfig
from stages.contract.fingerprint import fingerprint
from stages.logits.config import LogitsConfig
from stages.models.config import ModelConfig
from stages.shard.config import ShardConfig
from train.config import TrainConfig


def test_runtime_settings_change_no_fingerprint() -> None:
    one = LogitsConfig(batch_tokens=1, num_workers=1, device="cpu")
    other = LogitsConfig(batch_tokens=999, num_workers=8, device="cuda")
    assert one.result_settings() == other.result_settings()
    assert one.result_settings() != LogitsConfig(top_k=5).result_settings()


def test_a_setting_that_came_later_changes_no_fingerprint_at_its_default() -> None:
    assert "test_fraction" not in ShardConfig().result_settings()
    assert ShardConfig(test_fraction=0.1).result_settings()["test_fraction"] == 0.1
    assert (
        ShardConfig(test_fraction=0.1).result_settings().keys() - {"test_fraction"}
        == ShardConfig().result_settings().keys()
    )


def test_preset_and_its_settings_spelled_out_are_the_same_result() -> None:
    preset = AlignConfig(preset="semi-relaxed")
    spelled = AlignConfig.model_validate({key: value for key, value in preset.model_dump().items() if key != "preset"})
    assert preset.result_settings() == spelled.result_settings()
    assert preset.marginals == "source"
    assert preset.tail == "bucket"


def test_a_given_setting_overrides_the_preset() -> None:
    assert AlignConfig(preset="paper", epsilon=0.5).epsilon == 0.5


def test_fingerprint_chains_inputs_and_versions() -> None:
    base = fingerprint("align", 1, {"epsilon": 0.5}, {"source": "a"})
    assert len(base) == 12
    assert fingerprint("align", 1, {"epsilon": 0.5}, {"source": "b"}) != base
    assert fingerprint("align", 2, {"epsilon": 0.5}, {"source": "a"}) != base
    assert fingerprint("align", 1, {"epsilon": 0.4}, {"source": "a"}) != base


def test_lambda_is_named_as_in_the_file() -> None:
    assert TrainConfig.model_validate({"lambda": 0.5}).result_settings()["lambda"] == 0.5


def test_model_identity_follows_content_not_place(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights" if name != "c" else b"others")
        (tmp_path / name / "tokenizer.json").write_text("{}")
    a, b, c = (ModelConfig(name=name, path=tmp_path / name) for name in ("a", "b", "c"))
    assert a.weights_identity() == b.weights_identity() != c.weights_identity()
    assert a.tokenizer_identity() == c.tokenizer_identity()
    assert a.tokenizer_identity() != ModelConfig(name="a", path=tmp_path / "a", bos=True).tokenizer_identity()


def test_hub_model_is_identified_by_its_revision() -> None:
    assert ModelConfig(name="a", hub="org/model", revision="abc").weights_identity() == "org/model@abc"


@pytest.mark.parametrize(
    "place",
    [{}, {"hub": "org/model"}, {"hub": "org/model", "revision": "a", "path": "x"}, {"path": "x", "revision": "a"}],
)
def test_model_needs_exactly_one_place(place: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        ModelConfig(name="a", **place)
