"""Control tokens in documents: found by their text, split like any text, or read as tokens where that is asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from stages.models.config import ModelConfig
from stages.models.control_tokens import ControlTokens
from stages.models.tokenizer import SegmentTokenizer
from tests.tiny_tokenizers import FAMILIES, Family, save_tokenizer

CHAT = "<|im_start|>user\nHi, déjà vu?<|im_end|>\n<|im_start|>assistant\nThe dog.<|im_end|>\n"
ADDED = ("<|im_start|>", "<|im_end|>")


def test_control_tokens_of_unusual_forms_are_found() -> None:
    contents = (
        *ADDED,
        "<start_of_turn>",
        "[INST]",
        "[/INST]",
        "<｜User｜>",
        "<|fim▁begin|>",
        "</s>",
        "<s>",
        "<pad>",
        "",
    )
    tokens = ControlTokens(contents)
    assert tokens.find(CHAT) == set(ADDED)
    assert tokens.find("a<start_of_turn>user b [INST] c [/INST]<｜User｜>d<|fim▁begin|>") == set(contents[2:7])
    assert tokens.find("x <s> y </s> <pad> z") == set(), "markup of web pages looks the same"
    assert tokens.find("<|im_sep|> <|im_start |> <table> [NOTE] array[INDEX] a<b|c>d") == set()
    assert ControlTokens(()).find(CHAT) == set()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    """Tokenizers of all families with the control tokens of a chat template, the second of which is EOS."""
    found = {}
    for family in FAMILIES:
        folder = save_tokenizer(family, tmp_path_factory.mktemp(family))
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": [ADDED[0]], "eos_token": ADDED[1]})
        tokenizer.save_pretrained(folder)
        found[family] = folder
    return found


def load(folder: Path, **settings: str) -> SegmentTokenizer:
    return SegmentTokenizer.load(ModelConfig.model_validate({"name": "x", "path": folder, **settings}))


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_are_split_unless_they_are_asked_for(folders: dict[Family, Path], family: Family) -> None:
    split, parse = load(folders[family]), load(folders[family], control_tokens="parse")
    assert split.control_tokens == parse.control_tokens
    assert split.control_tokens >= set(ADDED)
    own = AutoTokenizer.from_pretrained(folders[family])
    ids = own.convert_tokens_to_ids(list(ADDED))
    assert not set(split.encode(CHAT, is_last=False).ids[split.num_prefix :].tolist()) & set(ids)
    encoding = parse.encode(CHAT, is_last=False)
    expected = own(CHAT, add_special_tokens=False)["input_ids"]
    assert encoding.ids[parse.num_prefix :].tolist() == expected, "as the tokenizer itself reads the text"
    assert sum(encoding.ids[parse.num_prefix :].tolist().count(one) for one in ids) == 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", [CHAT, CHAT + "no end", ADDED[1], f"x{ADDED[0]}{ADDED[1]} y"])
def test_parsed_control_tokens_end_where_their_text_ends(
    folders: dict[Family, Path], family: Family, text: str
) -> None:
    tokenizer = load(folders[family], control_tokens="parse")
    own = AutoTokenizer.from_pretrained(folders[family])
    encoding = tokenizer.encode(text, is_last=True)
    ends = encoding.byte_end
    assert np.all(np.diff(ends) >= 0)
    assert ends[-1] == len(text.encode())
    for content in ADDED:
        token_id = own.convert_tokens_to_ids(content)
        inside = slice(tokenizer.num_prefix, len(ends) - 1)  # between the prefix and the EOS of the document
        found = ends[inside][encoding.ids[inside] == token_id].tolist()
        raw, begin, expected = text.encode(), 0, []
        while (begin := raw.find(content.encode(), begin)) >= 0:
            begin += len(content)
            expected.append(begin)
        if family in ("unigram", "wordpiece") and expected and not raw[expected[-1] :].strip():
            expected[-1] = len(raw)  # white space that a tokenizer drops at the end belongs to the last token
        assert found == expected, content
    measured = tokenizer.measure(text)
    assert measured.byte_end().tolist() == ends[:-1].tolist()
    assert tokenizer.count(text) == len(ends)


def test_reading_control_tokens_is_another_tokenizer(folders: dict[Family, Path]) -> None:
    model = ModelConfig(name="x", path=folders["byte-bpe"])
    parsing = model.model_copy(update={"control_tokens": "parse"})
    assert parsing.tokenizer_identity() == f"{model.tokenizer_identity()};control_tokens=parse"
    assert parsing.weights_identity() == model.weights_identity()
    assert "control_tokens" not in model.result_settings()
