"""GGUF files: sound ones load, and what is cut short or lacks tensors is refused."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stages.models.config import ModelConfig, load_model
from stages.models.gguf_header import check_gguf
from stages.models.weights import WeightFileError
from tests.stages.models.preflight.spoil import messages, problems

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def save_gguf(folder: Path, file: Path, *, without: str = "none") -> Path:
    """Write a saved Llama as GGUF, in 32-bit floats, but for one tensor.

    Values are not what they were: its rotary halves are interleaved.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_token_list([f"token {index}" for index in range(config["vocab_size"])])
    writer.add_array("numbers", [1, 2, 3])
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem = name.removesuffix(".weight").replace("model.layers.", "blk.")
        for old, new in NAMES.items():
            stem = stem.replace(old, new)
        if stem != without:
            writer.add_tensor(f"{stem}.weight", tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def file(llama: Path, tmp_path: Path) -> Path:
    return save_gguf(llama, tmp_path / "model.gguf")


def test_a_sound_file_is_accepted_and_loads(file: Path, llama: Path) -> None:
    assert problems(file, tokenizer={"path": llama}) == []
    loaded = load_model(ModelConfig(name="m", path=file), dtype="float32", attention=("eager",), device="cpu")
    assert loaded.get_input_embeddings().weight.shape == (400, 64)


def test_a_file_whose_head_is_the_embedding_loads(llama: Path, tmp_path: Path) -> None:
    file = save_gguf(llama, tmp_path / "tied.gguf", without="output")
    loaded = load_model(ModelConfig(name="m", path=file), dtype="float32", attention=("eager",), device="cpu")
    assert torch.equal(loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight)


@pytest.mark.parametrize("missing", ["blk.1.ffn_up", "output_norm"])
def test_a_file_that_lacks_a_tensor_is_refused_where_it_is_loaded(llama: Path, tmp_path: Path, missing: str) -> None:
    file = save_gguf(llama, tmp_path / "lacking.gguf", without=missing)
    with pytest.raises(ValueError, match="model m: the weights lack model"):
        load_model(ModelConfig(name="m", path=file), dtype="float32", attention=("eager",), device="cpu")


@pytest.mark.parametrize("share", [0.999, 0.5, 0.001])
def test_a_file_cut_short_is_named(file: Path, llama: Path, share: float) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * share)])
    (found,) = messages(file, tokenizer={"path": llama})
    assert found.startswith(f"model m: {file}: cut short")
    assert "Fetch the file again" in found


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"GGML" + b"\x00" * 80, "it begins with b'GGML"),
        (b"GGUF\x09" + b"\x00" * 80, "version 9"),
        (b"GG", "it begins"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, start: bytes, said: str) -> None:
    (tmp_path / "model.gguf").write_bytes(start)
    with pytest.raises(WeightFileError, match=said):
        check_gguf(tmp_path / "model.gguf")


def test_what_reads_it_must_be_installed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.models.preflight import examine

    monkeypatch.setattr(examine.importlib.util, "find_spec", lambda name: None)
    (found,) = messages(file)
    assert (
        "gguf and accelerate is not installed; expected the packages that read GGUF files. `pip install ptafuse[demo]`"
        in found
    )
