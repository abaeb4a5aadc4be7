"""Tokenizers that are not those of their tokenizer.json, draw at random, or have tokens that the model has no row for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from stages.models.config import ModelConfig
from stages.models.tokenizer import SegmentTokenizer
from tests.stages.models.preflight.spoil import edit_json, messages, problems
from tests.tiny_models import save_model
from tests.tiny_tokenizers import FAMILIES, Family, save_tokenizer

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def edit_tokenizer(folder: Path, **changes: Any) -> None:
    """Change keys of tokenizer.json's model."""
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"] |= changes
    file.write_text(json.dumps(values))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizers_of_every_family_are_those_of_their_files(tmp_path: Path, family: Family) -> None:
    folder = save_model(tmp_path / "model")
    save_tokenizer(family, tmp_path / "tokenizer")
    assert problems(folder, tokenizer={"path": tmp_path / "tokenizer"}) == []


@pytest.fixture
def llama3_as_qwen2(tmp_path: Path) -> Path:
    """Llama-3's kind of tokenizer.json (numbers in groups of three digits) beside a model that is called Qwen-2."""
    folder = save_model(tmp_path / "model")
    save_tokenizer("byte-bpe", folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    values["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    vocab, merges = values["model"]["vocab"], values["model"]["merges"]
    for pair in (["1", "9"], ["19", "9"], ["1", "2"], ["12", "3"]):
        if pair not in merges:
            vocab.setdefault("".join(pair), max(vocab.values()) + 1)
            merges.append(pair)
    (folder / "tokenizer.json").write_text(json.dumps(values))
    edit_json(folder / "tokenizer_config.json", tokenizer_class=None)
    edit_json(folder / "config.json", model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    return folder


def test_a_tokenizer_of_another_class_than_its_file_is_refused(llama3_as_qwen2: Path) -> None:
    auto = AutoTokenizer.from_pretrained(llama3_as_qwen2)
    own = Tokenizer.from_file(str(llama3_as_qwen2 / "tokenizer.json"))
    assert auto("199", add_special_tokens=False)["input_ids"] != own.encode("199").ids
    found = [text for text in messages(llama3_as_qwen2) if "tokenizer.json" in text]
    assert len(found) == 1
    assert (
        "transformers loads a different tokenizer from this folder than tokenizer.json describes: in 'In 1999"
        in found[0]
    )
    assert "copy the tokenizer's files into a separate folder" in found[0]


def test_a_tokenizer_of_its_own_remedies_the_mismatch(llama3_as_qwen2: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama3_as_qwen2 / name, own / name)
    edit_json(own / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    found = messages(llama3_as_qwen2, tokenizer={"path": own})
    assert not [text for text in found if "different tokenizer" in text]


def test_special_tokens_around_a_text_are_no_difference(tmp_path: Path) -> None:
    """AutoTokenizer writes BOS, and the file by itself does not."""
    folder = save_model(tmp_path / "model")
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    assert values["post_processor"]
    file.write_text(json.dumps({**values, "post_processor": None}))
    assert problems(folder) == []


def test_truncation_in_the_file_is_no_difference(llama: Path) -> None:
    tokenizer = Tokenizer.from_file(str(llama / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(llama / "tokenizer.json"))
    assert problems(llama) == []


def test_a_space_that_tokenizer_config_adds_is_a_difference(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", architecture="gpt2", tokenizer_family="byte-bpe")
    assert problems(folder) == []
    edit_json(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", add_prefix_space=True)
    (found,) = messages(folder)
    assert "different tokenizer" in found


def test_dropout_is_switched_off_with_a_warning(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ModelConfig(name="m", path=llama)
    text = "The quick brown fox jumps over the lazy dog. " * 4
    expected = SegmentTokenizer.load(model).text_ids(text)
    edit_tokenizer(llama, dropout=0.3)
    assert problems(llama) == []
    assert "model m: its tokenizer splits words at random (dropout = 0.3" in caplog.text
    assert all(SegmentTokenizer.load(model).text_ids(text) == expected for _ in range(5))


def test_dropout_of_zero_is_not_reported(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_tokenizer(llama, dropout=0.0)
    assert problems(llama) == []
    assert "at random" not in caplog.text


def test_sampling_of_a_unigram_tokenizer_is_switched_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file says so today: tokenizers lets a program set it."""
    original = AutoTokenizer.from_pretrained

    def sampling(*arguments: Any, **settings: Any) -> Any:
        tokenizer = original(*arguments, **settings)
        tokenizer.backend_tokenizer.model.alpha, tokenizer.backend_tokenizer.model.nbest_size = 0.1, 8
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", sampling)
    save_tokenizer("unigram", tmp_path / "tokenizer")
    text = "The quick brown fox jumps over the lazy dog. " * 4
    drawn = sampling(tmp_path / "tokenizer").backend_tokenizer
    assert len({tuple(drawn.encode(text).ids) for _ in range(20)}) > 1, "the trap works"
    loaded = SegmentTokenizer.load(ModelConfig(name="m", path=tmp_path / "tokenizer"))
    assert "splits words at random (alpha = 0.1" in caplog.text
    assert len({tuple(loaded.text_ids(text)) for _ in range(20)}) == 1


def add_token(folder: Path, token: str = "<extra>", *, special: bool = False) -> int:
    """Add one token to a tokenizer, without a row in the model; returns its id."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([token], special_tokens=special)
    tokenizer.save_pretrained(folder)
    return int(tokenizer.convert_tokens_to_ids(token))


@pytest.mark.parametrize("special", [False, True])
def test_a_token_without_a_row_is_accepted_and_stands_for_nothing(llama: Path, special: bool) -> None:
    token_id = add_token(llama, special=special)
    assert token_id == 400
    assert problems(llama, trained=True) == []
    tokenizer = SegmentTokenizer.load(ModelConfig(name="m", path=llama))
    assert tokenizer.vocabulary.size == 401
    assert tokenizer.vocabulary.token_bytes[token_id] == b""
    assert tokenizer.vocabulary.is_special[token_id]
    assert tokenizer.encode("plain text", is_last=True).ids.max() < 400


@pytest.mark.parametrize("role", ["bos_token", "eos_token"])
def test_a_token_of_every_document_needs_a_row(llama: Path, role: str) -> None:
    add_token(llama, special=True)
    edit_json(llama / "tokenizer_config.json", **{role: "<extra>"})
    found = messages(llama, bos=True)
    assert len(found) == 1
    assert "documents with token 400, and the model's embedding has 400 rows" in found[0]


def test_a_tokenizer_without_offsets_is_refused_without_saying_the_model_twice(llama: Path) -> None:
    edit_json(llama / "tokenizer_config.json", tokenizer_class="NoSuchTokenizer")
    for file in ("tokenizer.json",):
        (llama / file).unlink()
    for text in messages(llama):
        assert text.count("model m:") == 1
