"""How a run chooses what runs its models, and keeps to it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.run.stage_table import stage_spec
from pipeline.settings.load import ConfigError, load_config
from pipeline.settings.run import RunConfig
from stages.contract.manifest import choices_key
from stages.contract.store import Store
from stages.logits.backends.choose import choose_backend
from stages.logits.backends.vllm import is_installed
from stages.logits.config import LogitsConfig
from stages.models.config import ModelConfig
from tests.tiny_run import ptafuse, status

MODEL = ModelConfig(name="tiny", path=Path("model"))


def manifests(run: Path, model: str) -> list[Path]:
    return sorted(run.glob(f"logits/{model}/*/manifests/*.json"))


@pytest.mark.slow
def test_the_value_chosen_for_auto_holds_for_the_whole_folder(
    undisturbed_run: Path, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(undisturbed_run, tmp_path / "run"))
    for path in run.glob("logits/*/*/choices.json"):
        assert json.loads(path.read_text()) == {"backend": "transformers"}
    lost = manifests(run, "neox")[2]
    expected = json.loads(lost.read_text())
    lost.unlink()
    monkeypatch.setattr(
        "stages.logits.backends.choose.choose_backend", lambda *_: "vllm"
    )  # as on a machine with a GPU and vLLM
    ptafuse("logits", str(tiny_config), "--run", str(run), "--local")
    again = json.loads(lost.read_text())
    assert again["versions"]["backend"] == expected["versions"]["backend"] == "transformers"
    assert again["data"]["sha256"] == expected["data"]["sha256"]


@pytest.mark.slow
@pytest.mark.skipif(is_installed(), reason="vLLM is installed")
def test_a_folder_started_with_vllm_is_refused_without_it(
    undisturbed_run: Path, tiny_config: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(undisturbed_run, tmp_path / "run"))
    lost = manifests(run, "neox")[0]
    lost.unlink()
    Store(str(run)).replace(choices_key(str(lost.parent.parent.relative_to(run))), b'{"backend": "vllm"}')
    ended = ptafuse("logits", str(tiny_config), "--run", str(run), "--local", check=False)
    assert ended.returncode
    message = " ".join((ended.stdout + ended.stderr).split())
    assert "as 'auto' chose when this folder was started" in message
    assert "vLLM is not installed here" in message
    assert not lost.exists()


def test_auto_without_a_gpu_is_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_backend(LogitsConfig(), MODEL) == "transformers"
    assert choose_backend(LogitsConfig(backend="vllm"), MODEL) == "vllm"
    with pytest.raises(ValueError, match="tensor_parallel_size = 2 needs vLLM, which cannot be used here: no GPU"):
        choose_backend(LogitsConfig(tensor_parallel_size=2), MODEL)


def test_auto_takes_transformers_for_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("stages.logits.backends.choose.is_installed", lambda: True)
    monkeypatch.setattr("stages.logits.backends.choose.knows_architecture", lambda _: True)
    assert choose_backend(LogitsConfig(), MODEL) == "vllm"
    assert choose_backend(LogitsConfig(), ModelConfig(name="m", path=Path("m.gguf"))) == "transformers"
    assert choose_backend(LogitsConfig(device="cpu"), MODEL) == "transformers"


def test_auto_takes_transformers_for_draws_from_the_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("stages.logits.backends.choose.is_installed", lambda: True)
    monkeypatch.setattr("stages.logits.backends.choose.knows_architecture", lambda _: True)
    assert choose_backend(LogitsConfig(tail_samples=4), MODEL) == "transformers"
    with pytest.raises(ValueError, match="tail_samples draws from the full distribution"):
        choose_backend(LogitsConfig(tail_samples=4, tensor_parallel_size=2), MODEL)


@pytest.mark.parametrize(
    ("settings", "gpus"),
    [
        ({}, None),
        ({"tensor_parallel_size": 4}, 4),
        ({"tensor_parallel_size": 4, "gpus_per_worker": 2}, 2),
        ({"tensor_parallel_size": 4, "device": "cpu"}, 0),
    ],
)
def test_an_actor_gets_the_gpus_that_share_its_model(settings: dict, gpus: float | None) -> None:
    config = load_config("demo").model_copy(update={"logits": LogitsConfig(**settings)})
    assert stage_spec("logits").resources(config, config.target.name).gpus == gpus


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("logits.backend='transformers'", "logits.tensor_parallel_size=2"), "splits a model, which needs vLLM"),
        (("align.top_p=0.9", "logits.top_p=0.8"), "asks for more probability than logits.top_p = 0.8 keeps"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(override: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("demo", override)


def test_the_backend_as_written_and_top_p_change_the_results_name() -> None:
    def named(**settings: object) -> dict:
        logits = LogitsConfig(**settings)  # type: ignore[arg-type]
        config: RunConfig = load_config("demo").model_copy(update={"logits": logits})
        return config.logits.result_settings()

    assert named() != named(backend="transformers")
    assert named() != named(top_p=0.9)
    assert named() == named(tensor_parallel_size=2, gpu_memory_utilization=0.5)


@pytest.mark.slow
def test_status_shows_the_models_share_of_the_time(undisturbed_run: Path) -> None:
    health = status(undisturbed_run)["logits/neox"]["health"]
    assert health["forward_share"] == pytest.approx(health["forward_seconds"] / health["stage_seconds"])
    assert 0 < health["forward_share"] <= 1
    assert health["tokens_per_second_per_worker"] == pytest.approx(health["tokens"] / health["stage_seconds"])
    shown = " ".join(ptafuse("status", str(undisturbed_run), "--all").stdout.split())
    assert f"forward_share │ {health['forward_share']:.4g} │" in shown


@pytest.mark.slow
def test_rows_cut_at_top_p_go_through_all_stages(undisturbed_run: Path, tiny_config: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(undisturbed_run, tmp_path / "run"))
    arguments = (str(tiny_config), "--run", str(run), "--local", "--upstream", "--set", "logits.top_p=0.7")
    ptafuse("fuse", *arguments)
    steps = status(run)
    assert all(steps[key]["is_done"] for key in ("logits/llama", "logits/neox", "align/neox", "fuse"))
    assert steps["logits/llama"]["health"]["topk_entries"] < 10
    whole = status(undisturbed_run)
    assert whole["logits/llama"]["health"]["topk_entries"] == 10
    for key in ("align/neox", "fuse"):
        assert steps[key]["health"]["positions"] == whole[key]["health"]["positions"]
