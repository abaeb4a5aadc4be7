"""byte_end and token bytes of every family, against the text itself and against independent answers."""

import itertools
import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stages.models.config import ModelConfig
from stages.models.tokenizer import Encoding, SegmentTokenizer
from stages.models.vocabulary import BOS_TEXT, EOS_TEXT
from tests.texts import texts
from tests.tiny_tokenizers import FAMILIES, TEXTS, save_tokenizer

EXAMPLES = settings(max_examples=150)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_tokenizer(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="module")
def originals(folders: dict[str, Path]) -> dict[str, Any]:
    """Provide the four families as transformers loads them, and two more kinds of byte-level BPE."""
    loaded = {family: AutoTokenizer.from_pretrained(folder) for family, folder in folders.items()}
    description = json.loads(loaded["byte-bpe"].backend_tokenizer.to_str())
    description["normalizer"] = {"type": "NFC"}
    loaded["byte-bpe-nfc"] = _wrap(Tokenizer.from_str(json.dumps(description)))
    description["normalizer"] = None
    description["model"]["ignore_merges"] = True
    tiktoken = Tokenizer.from_str(json.dumps(description))
    tiktoken.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    loaded["tiktoken-like"] = _wrap(tiktoken)
    return loaded


@pytest.fixture(scope="module")
def tokenizers(originals: dict[str, Any]) -> dict[str, SegmentTokenizer]:
    return {name: SegmentTokenizer(original, bos=None) for name, original in originals.items()}


def _wrap(backend: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(special or {"eos_token": "<|endoftext|>"}))


def _text_tokens(tokenizer: SegmentTokenizer, text: str) -> Encoding:
    """Return the encoding without BOS."""
    found = tokenizer.encode(text, is_last=False)
    skip = tokenizer.num_prefix
    return Encoding(found.ids[skip:], found.byte_end[skip:])


def _slices(text: str, byte_end: np.ndarray) -> list[bytes]:
    raw = text.encode()
    return [raw[start:end] for start, end in itertools.pairwise([0, *byte_end])]


def _spelled(tokenizer: SegmentTokenizer, ids: np.ndarray) -> list[bytes]:
    return [tokenizer.vocabulary.token_bytes[token_id] for token_id in ids]


def _ends(tokenizer: SegmentTokenizer, text: str) -> list[tuple[bytes, bytes]]:
    """(token's bytes, the text it covers) of each token."""
    found = _text_tokens(tokenizer, text)
    return list(zip(_spelled(tokenizer, found.ids), _slices(text, found.byte_end), strict=True))


@EXAMPLES
@given(text=texts)
def test_byte_end_never_falls_and_ends_at_the_text_length(text: str, tokenizers: dict[str, SegmentTokenizer]) -> None:
    for name, tokenizer in tokenizers.items():
        found = tokenizer.encode(text, is_last=True)
        assert found.ids.dtype == found.byte_end.dtype == np.int32
        assert len(found.ids) == len(found.byte_end) == tokenizer.count(text)
        assert (np.diff(found.byte_end) >= 0).all()
        assert found.byte_end[-1] == len(text.encode()), name
        if tokenizer.num_prefix:
            assert (found.ids[0], found.byte_end[0]) == (tokenizer.prefix_id, 0)
        own = _text_tokens(tokenizer, text)
        assert not len(own.ids) or own.byte_end[-1] == len(text.encode()), name


@EXAMPLES
@given(text=texts)
def test_bytes_of_the_text_cut_at_byte_end_are_the_token_bytes(
    text: str, tokenizers: dict[str, SegmentTokenizer]
) -> None:
    names = ["byte-bpe", "tiktoken-like", *(["spm-bpe"] if "▁" not in text else [])]
    for name in names:
        pairs = _ends(tokenizers[name], text)
        assert all(spelled == covered for spelled, covered in pairs[1:]), name
        for spelled, covered in pairs[:1]:
            assert spelled in ([covered, b" " + covered] if name == "spm-bpe" else [covered])


@EXAMPLES
@given(text=texts)
def test_ids_are_those_of_the_tokenizer_itself(
    text: str, originals: dict[str, Any], tokenizers: dict[str, SegmentTokenizer]
) -> None:
    for name, tokenizer in tokenizers.items():
        wanted = originals[name](text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert _text_tokens(tokenizer, text).ids.tolist() == wanted, name


@EXAMPLES
@given(text=texts)
def test_composed_characters_end_where_the_original_text_does(
    text: str, tokenizers: dict[str, SegmentTokenizer]
) -> None:
    """Oracle: the tokens spell NFC(text); split the text wherever NFC of the parts is the parts of NFC."""
    tokenizer = tokenizers["byte-bpe-nfc"]
    whole = unicodedata.normalize("NFC", text)
    boundaries: dict[int, set[int]] = {}  # byte in NFC(text) -> bytes in the text
    for cut in range(len(text) + 1):
        left, right = unicodedata.normalize("NFC", text[:cut]), unicodedata.normalize("NFC", text[cut:])
        if left + right == whole:
            boundaries.setdefault(len(left.encode()), set()).add(len(text[:cut].encode()))
    found = _text_tokens(tokenizer, text)
    spelled_end = 0
    for piece, end in zip(_spelled(tokenizer, found.ids), found.byte_end, strict=True):
        spelled_end += len(piece)
        if spelled_end in boundaries:
            assert end in boundaries[spelled_end]
        else:  # inside a character: strictly between the boundaries around it
            assert max(max(ends) for at, ends in boundaries.items() if at < spelled_end) < end
            assert end < min(min(ends) for at, ends in boundaries.items() if at > spelled_end)


@EXAMPLES
@given(text=texts)
def test_a_batch_equals_a_loop(text: str, tokenizers: dict[str, SegmentTokenizer]) -> None:
    batch = [text, "", "plain", text + "e\u0301", " " + text]
    is_last = [True, False, True, False, True]
    for tokenizer in tokenizers.values():
        together = tokenizer.encode_batch(batch, is_last=is_last)
        for one, last, found in zip(batch, is_last, together, strict=True):
            alone = tokenizer.encode(one, is_last=last)
            np.testing.assert_array_equal(found.ids, alone.ids)
            np.testing.assert_array_equal(found.byte_end, alone.byte_end)
        assert tokenizer.count_batch(batch) == [tokenizer.count(one) for one in batch]


def test_wordpiece_ends_are_exact_through_lower_casing_accents_and_dropped_white_space(
    tokenizers: dict[str, SegmentTokenizer],
) -> None:
    text = "The dog \n cafe\u0301, DOG  "
    pairs = _ends(tokenizers["wordpiece"], text)
    covered = [covered.decode() for _, covered in pairs]
    assert "".join(covered) == text
    assert "".join(spelled.decode() for spelled, _ in pairs).replace(" ", "") == "thedogcafe,dog"
    ends = {
        end: spelled for spelled, end in zip((s for s, _ in pairs), np.cumsum([len(c) for c in covered]), strict=True)
    }
    assert {3, 7, 15, 16} <= set(ends)  # The| dog| \n café|,| DOG
    assert covered[-1].endswith("  ")  # white space at the end belongs to the last token


def test_unigram_ends_are_exact_through_nfkc(tokenizers: dict[str, SegmentTokenizer]) -> None:
    pairs = _ends(tokenizers["unigram"], "The  ﬁsh  １０ ve\u0301 ")
    boundaries = np.cumsum([len(covered) for _, covered in pairs]).tolist()
    raw = "The  ﬁsh  １０ ve\u0301 ".encode()
    for part in ("The", "The  ﬁ", "The  ﬁsh", "The  ﬁsh  １", "The  ﬁsh  １０", "The  ﬁsh  １０ ve\u0301"):
        spelled_so_far = "".join(
            spelled.decode() for (spelled, _), end in zip(pairs, boundaries, strict=True) if end <= len(part.encode())
        )
        wanted = "".join(unicodedata.normalize("NFKC", part).split())
        if len(part.encode()) in boundaries:
            assert "".join(spelled_so_far.split()) == wanted
    assert boundaries[-1] == len(raw)
    assert {3, len("The  ﬁsh".encode()), len("The  ﬁsh  １０".encode())} <= set(boundaries)


def test_tokens_inside_one_character_end_inside_it(tokenizers: dict[str, SegmentTokenizer]) -> None:
    for name in ("byte-bpe", "byte-bpe-nfc", "spm-bpe"):
        ends = [0, *_text_tokens(tokenizers[name], "a😀e\u0301b").byte_end.tolist()]
        assert 1 in ends
        assert 5 in ends
        assert len([end for end in ends if 1 < end < 5]) >= 1, name


def test_text_without_tokens_has_only_the_special_ones(tokenizers: dict[str, SegmentTokenizer]) -> None:
    wordpiece = tokenizers["wordpiece"].encode(" \n ", is_last=True)
    assert wordpiece.byte_end.tolist() == [0, 3]
    unigram = tokenizers["unigram"].encode(" \n ", is_last=False)
    assert unigram.ids.tolist() == [tokenizers["unigram"].vocabulary.eos_id]  # what stands before every text
    for tokenizer in tokenizers.values():
        assert tokenizer.encode("", is_last=True).byte_end.tolist() == [0] * tokenizer.num_special


def test_eos_stands_only_where_a_document_ends(tokenizers: dict[str, SegmentTokenizer]) -> None:
    for tokenizer in tokenizers.values():
        inner, last = (tokenizer.encode("The dog.", is_last=is_last) for is_last in (False, True))
        assert last.ids.tolist() == [*inner.ids.tolist(), tokenizer.vocabulary.eos_id]
        assert last.byte_end.tolist() == [*inner.byte_end.tolist(), 8]


def test_bos_follows_the_tokenizer_unless_it_is_set(originals: dict[str, Any]) -> None:
    loaded = {name: SegmentTokenizer(original, bos=None) for name, original in originals.items()}
    uses_bos = {name for name, found in loaded.items() if found.prefix_id == found.vocabulary.bos_id}
    assert uses_bos == {"spm-bpe", "wordpiece"}
    without = SegmentTokenizer(originals["spm-bpe"], bos=False)
    assert without.encode("The", is_last=False).ids[0] == without.vocabulary.eos_id  # it separates documents
    with pytest.raises(ValueError, match="has no BOS token"):
        SegmentTokenizer(originals["unigram"], bos=True)


def test_names_of_special_tokens_in_a_text_are_text(tokenizers: dict[str, SegmentTokenizer]) -> None:
    text = "ends with </s>, <|endoftext|>, [EOS] or <s> here"
    for name, tokenizer in tokenizers.items():
        found = _text_tokens(tokenizer, text)
        special = tokenizer.vocabulary.is_special[found.ids]
        allowed = {"unigram": "</s>", "wordpiece": "[UNK]"}.get(name)
        for token_id, covered in zip(
            found.ids[special], np.array(_slices(text, found.byte_end), object)[special], strict=True
        ):
            if name == "unigram":  # its vocabulary holds the name as a piece; the bytes are exact all the same
                assert token_id == tokenizer.vocabulary.eos_id or covered.strip() != b"</s>"
            else:
                assert tokenizer.vocabulary.text(token_id) == allowed
    for name in ("byte-bpe", "byte-bpe-nfc", "tiktoken-like", "spm-bpe"):
        found = _text_tokens(tokenizers[name], text)
        assert not tokenizers[name].vocabulary.is_special[found.ids].any()
    unigram = dict(_ends(tokenizers["unigram"], "ends </s> here"))
    assert unigram[EOS_TEXT] in (b"</s>", b" </s>")


def test_the_given_tokenizer_is_not_changed(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        original = AutoTokenizer.from_pretrained(folder)
        before = original.backend_tokenizer.to_str(), original("The </s> dog")["input_ids"]
        SegmentTokenizer(original, bos=None).encode("The </s> dog", is_last=True)
        assert (original.backend_tokenizer.to_str(), original("The </s> dog")["input_ids"]) == before


def test_truncation_and_padding_of_the_tokenizer_are_ignored(folders: dict[str, Path]) -> None:
    original = AutoTokenizer.from_pretrained(folders["spm-bpe"])
    wanted = SegmentTokenizer(original, bos=None).encode(TEXTS[0], is_last=True).ids.tolist()
    original.backend_tokenizer.enable_truncation(4)
    original.backend_tokenizer.enable_padding(length=500)
    assert SegmentTokenizer(original, bos=False).encode(TEXTS[0], is_last=True).ids.tolist()[1:] == wanted[1:]


def test_a_word_boundary_is_one_space_in_every_family(tokenizers: dict[str, SegmentTokenizer]) -> None:
    for name, tokenizer in tokenizers.items():
        vocabulary = tokenizer.vocabulary
        spelled = {piece: token_id for token_id, piece in enumerate(vocabulary.token_bytes)}
        marked = [piece for piece, token_id in spelled.items() if vocabulary.is_marked[token_id]]
        assert len(marked) > 10, name
        assert all(piece.startswith(b" ") for piece in marked)
        token_id = spelled[b" th"] if b" th" in spelled else spelled[b" d"]
        assert vocabulary.text(token_id) in (" th", " d")
        assert vocabulary.text(token_id)[int(vocabulary.is_marked[token_id]) :] in ("th", "d")


def test_byte_tokens_are_their_bytes(tokenizers: dict[str, SegmentTokenizer], originals: dict[str, Any]) -> None:
    vocab = originals["spm-bpe"].get_vocab()
    spm = tokenizers["spm-bpe"].vocabulary
    assert [spm.token_bytes[vocab[f"<0x{byte:02X}>"]] for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert not spm.is_special[vocab["<0x0A>"]]
    byte_level = tokenizers["byte-bpe"].vocabulary
    assert {bytes([byte]) for byte in range(256)} <= set(byte_level.token_bytes)
    half = byte_level.token_bytes.index(b"\xf0")
    assert byte_level.text(half).encode("utf-8", errors="surrogateescape") == b"\xf0"


def test_wordpiece_tokens_have_the_space_that_their_decoder_writes(
    tokenizers: dict[str, SegmentTokenizer], originals: dict[str, Any]
) -> None:
    vocab, vocabulary = originals["wordpiece"].get_vocab(), tokenizers["wordpiece"].vocabulary
    assert vocabulary.token_bytes[vocab["d"]] == b" d"
    assert vocabulary.token_bytes[vocab["##d"]] == b"d"
    assert vocabulary.token_bytes[vocab["."]] == b"."
    assert not vocabulary.is_marked[vocab["."]]


def test_special_tokens_are_known_by_role(tokenizers: dict[str, SegmentTokenizer]) -> None:
    for name, tokenizer in tokenizers.items():
        vocabulary = tokenizer.vocabulary
        assert vocabulary.token_bytes[vocabulary.eos_id] == EOS_TEXT
        assert vocabulary.is_special[vocabulary.eos_id]
        assert vocabulary.text(vocabulary.eos_id) == "<eos>"
        assert not vocabulary.is_marked[vocabulary.eos_id]
        if name in ("spm-bpe", "wordpiece"):
            assert vocabulary.token_bytes[vocabulary.bos_id] == BOS_TEXT
    unk = tokenizers["wordpiece"].vocabulary.token_bytes.index(b"[UNK]")
    assert tokenizers["wordpiece"].vocabulary.is_special[unk]


def test_ids_without_a_token_are_special_and_empty(originals: dict[str, Any]) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 3, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    vocabulary = SegmentTokenizer(_wrap(backend, unk_token="[UNK]"), bos=None).vocabulary
    assert vocabulary.size == 4
    assert vocabulary.token_bytes[2] == b""
    assert vocabulary.is_special.tolist() == [False, True, True, False]
    assert SegmentTokenizer(originals["byte-bpe"], bos=None).vocabulary.size == len(originals["byte-bpe"])


def test_added_tokens_that_are_not_special_keep_their_own_text(folders: dict[str, Path]) -> None:
    original = AutoTokenizer.from_pretrained(folders["byte-bpe"])
    original.add_tokens(["        ", "<tool_call>", "é"])
    tokenizer = SegmentTokenizer(original, bos=None)
    text = "x        y<tool_call> é"
    pairs = _ends(tokenizer, text)
    assert all(spelled == covered for spelled, covered in pairs)
    assert {b"        ", b"<tool_call>", "é".encode()} <= {spelled for spelled, _ in pairs}


def test_a_dummy_prefix_in_the_middle_of_a_text_moves_no_end(folders: dict[str, Path]) -> None:
    original = AutoTokenizer.from_pretrained(folders["spm-bpe"])
    original.add_tokens([AddedToken("<mark>", normalized=False)])
    tokenizer = SegmentTokenizer(original, bos=None)
    text = "The<mark> dog<mark>The"  # the dummy prefix comes again after each mark
    found = _text_tokens(tokenizer, text)
    marks = [covered for spelled, covered in _ends(tokenizer, text) if spelled == b"<mark>"]
    assert marks == [b"<mark>", b"<mark>"]
    assert {3, 9, 13, 19, 22} <= set(found.byte_end.tolist())


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(ValueError, match=r"SlowTokenizer has no fast \(Rust\) backend.*tokenizer\.json"):
        SegmentTokenizer(SlowTokenizer(), bos=None)


def test_a_tokenizer_with_python_parts_is_refused() -> None:
    class Upper:
        def normalize(self, normalized: Any) -> None:
            normalized.uppercase()

    backend = Tokenizer(models.WordLevel({"A": 0}, unk_token="A"))
    backend.normalizer = normalizers.Normalizer.custom(Upper())
    with pytest.raises(ValueError, match=r"cannot be described as a tokenizer\.json"):
        SegmentTokenizer(type("Fast", (), {"backend_tokenizer": backend})(), bos=None)


def test_load_goes_through_the_model_config(folders: dict[str, Path]) -> None:
    model = ModelConfig(name="tiny", path=folders["spm-bpe"], bos=False)
    loaded = SegmentTokenizer.load(model)
    assert loaded.prefix_id == loaded.vocabulary.eos_id
    with pytest.raises(ValueError, match=r"model other: `bos = true`"):
        SegmentTokenizer.load(ModelConfig(name="other", path=folders["unigram"], bos=True))


REAL = ("llama2", "openllama-v1", "mpt-7b", "qwen3", "t5-small", "bert-base-uncased")


@pytest.mark.slow
@pytest.mark.skipif("PTAFUSE_DATA" not in os.environ, reason="PTAFUSE_DATA names no folder of reference tokenizers")
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_on_real_text(name: str) -> None:
    folder = Path(os.environ["PTAFUSE_DATA"])
    original = AutoTokenizer.from_pretrained(folder / "tokenizers" / name)
    tokenizer = SegmentTokenizer(original, bos=None)
    with (folder / "text" / "mixed.jsonl").open(encoding="utf-8") as lines:
        documents = [json.loads(line)["text"][:20_000] for line in list(lines)[::8]]
    num_spelled = 0
    for text, found in zip(documents, tokenizer.encode_batch(documents, is_last=[False] * len(documents)), strict=True):
        skip = tokenizer.num_prefix
        ids, byte_end = found.ids[skip:], found.byte_end[skip:]
        assert ids.tolist() == original(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert (np.diff(byte_end) >= 0).all()
        assert byte_end[-1] == len(text.encode())
        spelled = _spelled(tokenizer, ids)
        if b"".join(spelled) in (text.encode(), b" " + text.encode()):
            num_spelled += 1
            covered = _slices(text, byte_end)
            assert covered[1:] == spelled[1:]
            assert spelled[0] in (covered[0], b" " + covered[0])
        else:  # white space was dropped or letters changed: tokens and the text they cover agree without them
            wrong = [
                (piece, part)
                for token_id, piece, part in zip(ids, spelled, _slices(text, byte_end), strict=True)
                if not tokenizer.vocabulary.is_special[token_id] and _folded(piece) != _folded(part)
            ]
            assert not wrong
    assert (num_spelled == len(documents)) == (name not in ("t5-small", "bert-base-uncased"))


def _folded(piece: bytes) -> str:
    text = unicodedata.normalize("NFKD", piece.decode("utf-8", errors="replace").lower())
    return "".join(character for character in text if not character.isspace() and not unicodedata.combining(character))


def test_a_loaded_tokenizer_is_remembered_until_its_files_change(tmp_path):
    folder = save_tokenizer("byte-bpe", tmp_path / "one")
    model = ModelConfig(name="one", path=folder)
    first = SegmentTokenizer.load(model)
    assert SegmentTokenizer.load(model) is first
    assert SegmentTokenizer.load(ModelConfig(name="one", path=folder, bos=False)) is not first
    save_tokenizer("spm-bpe", folder)
    assert SegmentTokenizer.load(model).vocabulary.token_bytes != first.vocabulary.token_bytes
