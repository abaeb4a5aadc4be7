"""Safetensors headers as they are read without the library, and which files of a folder count."""

from pathlib import Path

import pytest

from stages.models.config import ModelConfig
from stages.models.weights import SINGLE_FILE, read_header, stored_tensors, tensor_files
from tests.tiny_models import save_model, split_weights


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_model(tmp_path / "llama")


def test_a_header_is_what_the_library_reads(llama: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(llama / SINGLE_FILE)
    stored = read_header(llama / SINGLE_FILE)
    assert {name: value.shape for name, value in stored.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert {value.dtype for value in stored.values()} == {"F32"}
    assert sum(value.num_elements for value in stored.values()) == sum(tensor.numel() for tensor in tensors.values())


def test_weights_that_lie_there_twice_are_read_once(llama: Path) -> None:
    names = stored_tensors(llama)
    (llama / "consolidated.safetensors").write_bytes((llama / SINGLE_FILE).read_bytes())
    (llama / "model.fp16.safetensors").write_bytes((llama / SINGLE_FILE).read_bytes())
    assert stored_tensors(llama) == names
    whole = (llama / SINGLE_FILE).read_bytes()
    split_weights(llama)
    assert stored_tensors(llama).keys() == names.keys()
    (llama / SINGLE_FILE).write_bytes(whole)
    assert set(tensor_files(ModelConfig(name="m", path=llama)).values()) == {SINGLE_FILE}
    assert stored_tensors(llama) == names, "transformers prefers the single file to the index"
