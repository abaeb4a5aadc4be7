"""Models of the hub: examined as far as the local cache has them, and nothing is fetched."""

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, constants

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
    """Provide a model in the hub's cache, its branch ``main`` at ``REVISION``."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--some--llama"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    return Path(shutil.copytree(llama, repository / "snapshots" / REVISION))


def problems(revision: str = REVISION, **arguments: bool) -> list[str]:
    model = ModelConfig(name="m", hub="some/llama", revision=revision)
    return [str(problem) for problem in examine(model, may_ask_hub=False, **arguments)]


@pytest.mark.parametrize("revision", [REVISION, "main"])
def test_a_sound_model_in_the_cache_is_accepted(snapshot: Path, revision: str) -> None:
    assert problems(revision) == []
    assert embedding_rows(ModelConfig(name="m", hub="some/llama", revision=revision)) == 400


@pytest.mark.parametrize("revision", [REVISION, "main"])
def test_the_problem_of_a_cached_hub_model_is_named(snapshot: Path, revision: str) -> None:
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


def test_a_configuration_that_is_only_in_the_cache_is_examined(snapshot: Path) -> None:
    (snapshot / "model.safetensors").unlink()
    edit_json(snapshot / "config.json", is_encoder_decoder=True)
    (found,) = problems()
    assert "is an encoder-decoder" in found


def test_its_tokenizer_is_examined_where_the_hub_may_be_asked(snapshot: Path) -> None:
    model = ModelConfig(name="m", hub="some/llama", revision=REVISION)
    assert examine(model) == []
    (snapshot / "tokenizer.json").write_text("{")
    assert examine(model, may_ask_hub=False) == []
    (found,) = examine(model)
    assert found.file == str(snapshot / "tokenizer.json")
    assert "not JSON" in found.found


class Hub:
    """The hub's answer to which files a model has.

    Attributes:
        num_asked: how often it was asked.
    """

    def __init__(self, *names: str) -> None:
        self._names = names
        self.num_asked = 0

    def model_info(self, repo_id: str, *, revision: str, timeout: float) -> SimpleNamespace:
        assert (repo_id, revision) == ("some/llama", REVISION)
        assert timeout <= 10
        self.num_asked += 1
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self._names])

    def answer(self, monkeypatch: pytest.MonkeyPatch) -> "Hub":
        monkeypatch.setattr(HfApi, "model_info", self.model_info)
        return self


PICKLED = ("config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "training_args.bin")


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_model_with_only_pickled_weights_is_named_before_they_are_fetched(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch, is_cached: bool
) -> None:
    hub = Hub(*PICKLED).answer(monkeypatch)
    if is_cached:
        (snapshot / "model.safetensors").unlink()  # configuration and tokenizer are there
    else:
        shutil.rmtree(snapshot)
    (found,) = examine(ModelConfig(name="m", hub="some/llama", revision=REVISION))
    assert str(found) == (
        f"model m: some/llama@{REVISION}: the model has only pickled weights (pytorch_model-00001-of-00002.bin and 1 "
        "more), which can run arbitrary code and are not loaded; expected *.safetensors. `ptafuse convert some/llama "
        f"--revision {REVISION} --output FOLDER` converts them to safetensors without running any of their code; then "
        "give FOLDER as `path`, in place of `hub` and `revision`"
    )
    assert hub.num_asked == 1


@pytest.mark.parametrize(
    "names", [(*PICKLED, "model.safetensors"), ("config.json", "training_args.bin"), ("config.json",), ()]
)
def test_a_model_of_the_hub_with_other_files_is_left_to_its_download(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    (snapshot / "model.safetensors").unlink()
    (snapshot / "pytorch_model.bin").touch()  # fetched to be converted; what the hub says counts
    Hub(*names).answer(monkeypatch)
    assert examine(ModelConfig(name="m", hub="some/llama", revision=REVISION)) == []


@pytest.mark.parametrize("arguments", [{"may_ask_hub": False}, {"has_weights": False}])
def test_the_hub_is_not_asked_where_it_may_not_be_or_another_has_the_weights(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, bool]
) -> None:
    hub = Hub(*PICKLED).answer(monkeypatch)
    (snapshot / "model.safetensors").unlink()
    assert examine(ModelConfig(name="m", hub="some/llama", revision=REVISION), **arguments) == []
    assert hub.num_asked == 0


def test_the_hub_is_not_asked_for_weights_that_are_in_the_cache(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(*PICKLED).answer(monkeypatch)
    assert examine(ModelConfig(name="m", hub="some/llama", revision=REVISION)) == []
    assert hub.num_asked == 0


def test_where_the_hub_does_not_answer_the_cache_speaks_for_it(snapshot: Path) -> None:
    """``HF_HUB_OFFLINE`` is set here."""
    model = ModelConfig(name="m", hub="some/llama", revision=REVISION)
    (snapshot / "model.safetensors").unlink()
    assert examine(model) == []
    (snapshot / "pytorch_model.bin").touch()
    (found,) = examine(model)
    assert f"`ptafuse convert some/llama --revision {REVISION} --output FOLDER`" in found.remedy
