import json
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.models import embeddings
from stages.models.config import ModelConfig
from stages.models.embeddings import load_input_embeddings
from tests.tiny_models import Architecture, save_model


def stored(folder) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.get_input_embeddings().weight.detach().to(torch.float16).numpy()


@pytest.fixture
def no_whole_model(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the whole model was loaded")

    monkeypatch.setattr(embeddings, "load_model", refuse)


@pytest.mark.parametrize("architecture", get_args(Architecture))
@pytest.mark.usefixtures("no_whole_model")
def test_embeddings_are_read_without_the_model(tmp_path, architecture):
    folder = save_model(tmp_path / "model", architecture=architecture, vocab_padding=3)
    found = load_input_embeddings(ModelConfig(name="m", path=folder))
    assert found.dtype == np.float16
    assert (found == stored(folder)).all()


@pytest.mark.usefixtures("no_whole_model")
def test_embeddings_are_found_in_one_of_several_files(tmp_path):
    folder = save_model(tmp_path / "model")
    expected = stored(folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in parts.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    assert (load_input_embeddings(ModelConfig(name="m", path=folder)) == expected).all()


@pytest.mark.usefixtures("no_whole_model")
def test_a_checkpoint_of_only_the_body_has_names_without_prefix(tmp_path):
    folder = save_model(tmp_path / "model", architecture="gemma3")
    expected = stored(folder)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    assert (load_input_embeddings(ModelConfig(name="m", path=folder)) == expected).all()


def test_weights_under_names_of_their_own_are_loaded_whole(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "model")
    expected = stored(folder)
    monkeypatch.setattr(embeddings, "_checkpoint_names", lambda name, skeleton: ["of_another_library"])
    assert (load_input_embeddings(ModelConfig(name="m", path=folder)) == expected).all()


def test_a_folder_without_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model m: its configuration cannot be loaded"):
        load_input_embeddings(ModelConfig(name="m", path=tmp_path))
