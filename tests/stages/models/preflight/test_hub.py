"""Models of the hub: examined as far as the local cache has them, and nothing is fetched."""

import shutil
import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from stages.models.config import ModelConfig, embedding_rows
from stages.models.preflight.examine import examine, unexamined
from tests.stages.models.preflight.spoil import change_weights, edit_json

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network is used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def snapshot(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in the hub's cache, its branch ``main`` at ``REVISION``."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--some--llama"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    return Path(shutil.copytree(llama, repository / "snapshots" / REVISION))


def problems(revision: str = REVISION, **arguments: bool) -> list[str]:
    model = ModelConfig(name="m", hub="some/llama", revision=revision)
    return [str(problem) for problem in examine(model, tokenizers_of_hub=False, **arguments)]


@pytest.mark.parametrize("revision", [REVISION, "main"])
def test_a_sound_model_in_the_cache_is_accepted(snapshot: Path, revision: str) -> None:
    assert problems(revision) == []
    assert embedding_rows(ModelConfig(name="m", hub="some/llama", revision=revision)) == 400


@pytest.mark.parametrize("revision", [REVISION, "main"])
def test_what_is_wrong_with_it_is_named(snapshot: Path, revision: str) -> None:
    change_weights(snapshot, lambda tensors: {name: tensors[name] for name in tensors if name != "lm_head.weight"})
    edit_json(snapshot / "config.json", pad_token_id=9000)
    (found,) = problems(revision)
    assert "pad_token_id" in found
    edit_json(snapshot / "config.json", pad_token_id=None)
    (found,) = problems(revision)
    assert found.startswith(f"model m: {snapshot}: the weights lack lm_head.weight")


def test_what_is_not_in_the_cache_is_not_missed_and_is_said(snapshot: Path) -> None:
    model = ModelConfig(name="m", hub="some/llama", revision=REVISION)
    assert unexamined(model) is None
    assert unexamined(ModelConfig(name="m", path=snapshot)) is None
    (snapshot / "model.safetensors").unlink()
    assert problems() == []
    assert str(unexamined(model)).startswith("its weights are not in the local cache")
    (snapshot / "config.json").unlink()
    assert problems() == []
    assert str(unexamined(model)).startswith("it is not in the local cache")
    assert examine(ModelConfig(name="m", hub="some/other", revision=REVISION)) == []
    assert embedding_rows(ModelConfig(name="m", hub="some/other", revision=REVISION)) is None


def test_a_configuration_that_is_in_the_cache_alone_is_examined(snapshot: Path) -> None:
    (snapshot / "model.safetensors").unlink()
    edit_json(snapshot / "config.json", is_encoder_decoder=True)
    (found,) = problems()
    assert "is an encoder-decoder" in found


def test_its_tokenizer_is_examined_where_the_hub_may_be_asked(snapshot: Path) -> None:
    model = ModelConfig(name="m", hub="some/llama", revision=REVISION)
    assert examine(model) == []
    (snapshot / "tokenizer.json").write_text("{")
    assert examine(model, tokenizers_of_hub=False) == []
    (found,) = examine(model)
    assert found.file == str(snapshot / "tokenizer.json")
    assert "not JSON" in found.found
