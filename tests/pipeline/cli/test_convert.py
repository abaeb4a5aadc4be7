"""``ptafuse convert``."""

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from stages.models.convert import PICKLED_FILE
from stages.models.weights import SINGLE_FILE
from tests.tiny_models import save_model
from tests.tiny_run import ptafuse

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    folder = save_model(tmp_path / "llama")
    torch.save(load_file(folder / SINGLE_FILE), folder / PICKLED_FILE)
    (folder / SINGLE_FILE).unlink()
    return folder


def test_a_folder_is_converted_and_the_command_says_what_to_write(pickled: Path) -> None:
    shown = " ".join(ptafuse("convert", str(pickled)).stdout.split())
    assert "model.safetensors: written and compared" in shown
    assert f"and equal the pickled ones: give the model as `path = '{pickled}'`" in shown
    again = ptafuse("convert", str(pickled), check=False)
    assert again.returncode == 1
    assert "existing files are not overwritten" in again.stderr
    assert "Traceback" not in again.stderr


def test_a_model_of_the_hub_is_written_to_a_folder_and_the_cache_is_left(
    pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--some--llama" / "snapshots" / REVISION
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(pickled, snapshot)
    before = sorted(snapshot.iterdir())
    ptafuse("convert", "some/llama", "--revision", REVISION, "--output", str(tmp_path / "out"))
    assert sorted(snapshot.iterdir()) == before
    assert (tmp_path / "out" / SINGLE_FILE).exists()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (pickled / "tokenizer.json").read_bytes()
    done = ptafuse("convert", "some/other", "--revision", REVISION, "--output", str(tmp_path / "other"), check=False)
    assert done.returncode == 1
    assert f"some/other@{REVISION} cannot be fetched" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("some/llama",), "some/llama is not a folder: give one with config.json and pytorch_model.bin, or the id"),
        (("some/llama", "--revision", "main"), "--revision is for a model of the hub: also give --output"),
    ],
)
def test_incomplete_arguments_are_refused(arguments: tuple[str, ...], message: str) -> None:
    done = ptafuse("convert", *arguments, check=False)
    assert done.returncode == 1
    assert message in done.stderr
