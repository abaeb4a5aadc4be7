"""Files that are cut short, stand for others, or are of another kind of model."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from stages.models.config import ModelConfig
from stages.models.preflight import remember
from stages.models.preflight.examine import examine
from stages.models.weights import INDEX_FILE, SINGLE_FILE, WeightFileError, stored_tensors
from tests.stages.models.preflight.spoil import LFS_POINTER, edit_json, messages, problems
from tests.tiny_models import save_model, split_weights


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            SINGLE_FILE,
            LFS_POINTER.encode(),
            "a Git LFS pointer (81 bytes of text); expected the file itself. Run `git lfs pull`",
        ),
        (SINGLE_FILE, b"", "empty"),
        (SINGLE_FILE, b"<!DOCTYPE html><html><body>Access denied", "an HTML page"),
        (SINGLE_FILE, b"PK\x03\x04" + b"\x00" * 80, "not a safetensors file (it begins with b'PK"),
        (SINGLE_FILE, (40).to_bytes(8, "little") + b'{"a": {"dtype": "F32"' + b" " * 40, "its header is broken"),
        ("config.json", LFS_POINTER.encode(), "a Git LFS pointer"),
        ("config.json", b'{"model_type": ', "not JSON: Expecting value"),
        ("config.json", b"[1]", "not a JSON object"),
        ("generation_config.json", LFS_POINTER.encode(), "a Git LFS pointer"),
        ("tokenizer.json", LFS_POINTER.encode(), "a Git LFS pointer"),
        ("tokenizer.json", b'{"version": "1.0", "model"', "not JSON"),
        ("tokenizer.json", b'{"version": "1.0"}', "its tokenizer cannot be loaded"),
        ("tokenizer_config.json", b"{", "not JSON"),
    ],
)
def test_damaged_model_files_are_named(llama: Path, name: str, content: bytes, said: str) -> None:
    (llama / name).write_bytes(content)
    (found,) = messages(llama)
    assert found.startswith(f"model m: {llama}")
    assert said in found
    assert found.count("model m:") == 1


@pytest.mark.parametrize("num_bytes", [4, 300, -1])
def test_a_file_cut_short_is_named_with_what_is_there(llama: Path, num_bytes: int) -> None:
    file = llama / SINGLE_FILE
    whole = file.stat().st_size
    file.write_bytes(file.read_bytes()[:num_bytes])
    (found,) = messages(llama)
    assert str(file) in found
    assert "Fetch the file again" in found
    if num_bytes == -1:
        assert f"cut short: {whole - 1:,} of {whole:,} bytes; expected a whole file" in found


def test_a_dangling_link_is_named(llama: Path) -> None:
    """As git-annex leaves it, or a hub's cache whose blobs were removed."""
    (llama / SINGLE_FILE).unlink()
    (llama / SINGLE_FILE).symlink_to(llama / "gone")
    (found,) = messages(llama)
    assert "a link to a file that does not exist" in found


def test_a_shard_that_the_index_names_and_that_is_missing_is_named(llama: Path) -> None:
    _, second = split_weights(llama)
    (llama / second).unlink()
    (found,) = messages(llama)
    assert (
        found == f"model m: {llama}: the index names {second}, which does not exist; expected all 2 files. Fetch them"
    )


def test_shards_without_an_index_are_named(llama: Path) -> None:
    first, _ = split_weights(llama)
    (llama / INDEX_FILE).unlink()
    (found,) = messages(llama)
    assert f"there is neither model.safetensors nor an index, only {first}" in found


def test_a_file_that_is_not_an_index_is_named(llama: Path) -> None:
    split_weights(llama)
    (llama / INDEX_FILE).write_text("{}")
    (found,) = messages(llama)
    assert "not an index of safetensors" in found
    with pytest.raises(WeightFileError, match="not an index"):
        stored_tensors(llama)


def test_a_path_to_a_weight_file_is_refused_with_its_folder(llama: Path) -> None:
    (found,) = messages(llama / SINGLE_FILE)
    assert f"{llama / SINGLE_FILE} is a file" in found
    assert f"give its folder, {llama}" in found


def test_a_missing_folder_and_a_folder_without_weights_are_named(tmp_path: Path, llama: Path) -> None:
    (found,) = messages(tmp_path / "none")
    assert "no such model or tokenizer" in found
    (llama / SINGLE_FILE).unlink()
    (found,) = messages(llama)
    assert "holds no weights (expected *.safetensors)" in found
    (llama / "pytorch_model-00001-of-00002.bin").touch()
    (llama / "pytorch_model-00002-of-00002.bin").touch()
    (found,) = messages(llama)
    assert "holds only pickled weights (pytorch_model-00001-of-00002.bin and 1 more)" in found
    assert f"`ptafuse convert {llama}` converts them to safetensors" in found


def test_every_problem_of_a_folder_is_named_at_once(llama: Path) -> None:
    edit_json(llama / "config.json", pad_token_id=9000, is_causal=False)
    (llama / SINGLE_FILE).write_text(LFS_POINTER)
    (llama / "adapter_config.json").write_text("{}")
    (llama / "generation_config.json").write_text("{")
    found = messages(llama)
    assert len(found) == 5
    for said in ("pad_token_id", "is_causal", "Git LFS", "adapter", "generation_config.json"):
        assert sum(said in text for text in found) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model_type": "t5", "is_encoder_decoder": True},
            "t5 is an encoder-decoder; expected a decoder-only language model",
        ),
        ({"model_type": "vit"}, "vit is not a causal language model"),
        ({"model_type": "of-the-future"}, "transformers cannot read it"),
        ({"model_type": None}, "it has no `model_type`"),
        ({"is_causal": False}, "`is_causal` is false: each position sees the text after it"),
        ({"pad_token_id": 400}, "`pad_token_id` is 400, and the vocabulary has 400 tokens; expected an id below 400"),
        ({"hidden_size": 63}, "The hidden size (63) is not a multiple of the number of attention heads (4)"),
        (
            {"auto_map": {"AutoConfig": "own.Config"}, "model_type": "own"},
            "If you trust it, set `trust_remote_code = true` for m",
        ),
    ],
)
def test_configurations_of_other_models_are_refused(llama: Path, changes: dict, said: str) -> None:
    edit_json(llama / "config.json", **changes)
    (found,) = messages(llama)
    assert str(llama / "config.json") in found
    assert said in found


@pytest.mark.parametrize("pad", [-1, 0, 399])
def test_padding_tokens_inside_the_vocabulary_are_accepted(llama: Path, pad: int) -> None:
    edit_json(llama / "config.json", pad_token_id=pad)
    assert problems(llama) == []


def save_configured(folder: Path, architecture: str, **settings: object) -> Path:
    """Return a folder of another architecture's model."""
    from transformers import AutoModelForCausalLM

    save_model(folder)
    config = AutoConfig.for_model(architecture, vocab_size=400, bos_token_id=1, eos_token_id=2, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    return folder


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_an_encoder_is_refused_unless_it_is_a_decoder(tmp_path: Path, architecture: str) -> None:
    folder = save_configured(tmp_path / "model", architecture, **SMALL)
    (found,) = messages(folder)
    assert f"{architecture} is an encoder here (`is_decoder` is false)" in found
    edit_json(folder / "config.json", is_decoder=True)
    assert problems(folder) == []


def test_biogpt_is_accepted_as_a_decoder(tmp_path: Path) -> None:
    assert problems(save_configured(tmp_path / "model", "biogpt", **SMALL)) == []


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 2}),
        ("lfm2", {**SMALL, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}),
    ],
)
def test_models_that_cannot_keep_documents_apart_are_refused_where_that_is_asked(
    tmp_path: Path, architecture: str, settings: dict
) -> None:
    folder = save_configured(tmp_path / "model", architecture, **settings)
    assert problems(folder) == []
    assert problems(folder, trained=True) == []
    (found,) = messages(folder, trained=True, isolated=True)
    assert "packed documents cannot be isolated" in found
    assert "Set train.isolate_documents = false" in found


@pytest.mark.parametrize(
    ("quantised", "package"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptqmodel"),
        ({"quant_method": "awq"}, "gptqmodel"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_method": "quanto"}, "optimum-quanto"),
    ],
)
def test_quantised_weights_name_the_package_that_they_need(llama: Path, quantised: dict, package: str) -> None:
    edit_json(llama / "config.json", quantization_config=quantised)
    (found,) = messages(llama)
    assert f"the weights are quantised ({quantised.get('quant_method', 'bitsandbytes')}), and {package}" in found
    assert f"`pip install {package}" in found


def test_quantised_weights_are_not_trained(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.models import quantization

    monkeypatch.setattr(quantization, "_is_installed", lambda module: True)
    edit_json(llama / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    (found,) = messages(llama, trained=True)
    assert "the weights are quantised (gptq), and this model is trained; expected plain weights" in found


def test_an_adapter_next_to_the_weights_is_refused(llama: Path) -> None:
    """transformers would apply it where peft is installed, and leave it out where it is not."""
    (llama / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (found,) = messages(llama)
    assert "the folder also holds an adapter" in found
    assert "merge_and_unload" in found


def test_what_was_found_sound_is_not_examined_again_until_a_file_changes(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.models.preflight import examine as module

    model = ModelConfig(name="m", path=llama)
    assert examine(model) == []
    with monkeypatch.context() as patch:
        patch.setattr(module, "build_skeleton", lambda *_: pytest.fail("examined again"))
        patch.setattr(module, "tokenizer_problems", lambda *_, **__: pytest.fail("examined again"))
        assert examine(model) == []
    edit_json(llama / "config.json", num_hidden_layers=1)
    assert len(examine(model)) == 1
    assert len(examine(model)) == 1, "what is wrong is not remembered"


def test_a_cache_that_cannot_be_written_costs_only_the_next_examination(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert problems(llama) == []
    assert remember.examine_once(["key"], [llama], list) == []
