"""Cuts fit every tokenizer and lose nothing."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from stages.contract.models import ModelConfig
from stages.contract.tokens import SegmentTokenizer
from stages.shard.cut import CutError, Measure, cut_document
from tests.texts import texts
from tests.tiny_tokenizers import FAMILIES, TEXTS, save_tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SegmentTokenizer]:
    def load(family: str, folder: Path) -> SegmentTokenizer:
        return SegmentTokenizer.load(ModelConfig(name=family, path=save_tokenizer(family, folder)))

    return {family: load(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def _measure(tokenizer: SegmentTokenizer) -> Measure:
    return lambda text: tokenizer.encode(text, is_last=False).byte_end


def by_characters(text: str) -> np.ndarray:
    """A tokenizer with one token a character."""
    return np.cumsum([len(character.encode()) for character in text], dtype=np.int32)


def by_words(text: str) -> np.ndarray:
    """A tokenizer that keeps words alone."""
    ends, end = [], 0
    for word in text.split():
        end = text.index(word, end) + len(word)
        ends.append(len(text[:end].encode()))
    if ends:
        ends[-1] = len(text.encode())
    return np.array(ends, np.int32)


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(texts, min_size=1, max_size=6), max_length=st.integers(10, 40))
def test_segments_concatenate_to_the_document_and_fit_every_tokenizer(
    parts: list[str], max_length: int, tokenizers: dict[str, SegmentTokenizer]
) -> None:
    text = "".join(parts) or "x"
    try:
        segments = cut_document(text, [_measure(tokenizer) for tokenizer in tokenizers.values()], max_length)
    except CutError:
        reject()  # white space that one drops, or a character that NFKC makes many of; Hypothesis fails if it is common
    assert "".join(segments) == text
    assert all(segments)
    for tokenizer in tokenizers.values():
        assert max(tokenizer.count_batch(segments)) <= max_length


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(texts, min_size=1, max_size=8), max_length=st.integers(8, 30))
def test_byte_tokenizers_cut_every_document(
    parts: list[str], max_length: int, tokenizers: dict[str, SegmentTokenizer]
) -> None:
    text = "".join(parts) or "x"
    pair = [tokenizers["byte-bpe"], tokenizers["spm-bpe"]]
    segments = cut_document(text, [_measure(tokenizer) for tokenizer in pair], max_length)
    assert "".join(segments) == text
    assert max(tokenizer.count(segment) for tokenizer in pair for segment in segments) <= max_length


def test_a_document_that_fits_stays_whole(tokenizers: dict[str, SegmentTokenizer]) -> None:
    measures = [_measure(tokenizer) for tokenizer in tokenizers.values()]
    assert cut_document(TEXTS[0], measures, 500) == [TEXTS[0]]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("aaaa\nbb\n\ncc cc cc", ["aaaa\nbb\n\n", "cc cc cc"]),  # a paragraph before a later space
        ("aaaa bb\r\n\r\ncc cc", ["aaaa bb\r\n\r\n", "cc cc"]),
        ("aaaa bb\ncc cc cc", ["aaaa bb\n", "cc cc cc"]),  # a line
        ("aaaa bbbb cc dddd", ["aaaa bbbb", " cc dddd"]),  # before white space
        ("a\n\nbbbbbbb bbb cccc", ["a\n\nbbbbbbb", " bbb cccc"]),  # a paragraph in the first half is too early
        ("a" * 25, ["a" * 11, "a" * 11, "a" * 3]),
        ("a" * 10 + "e\u0301" + "a" * 4, ["a" * 10, "e\u0301" + "a" * 4]),  # not between a letter and its accent
        ("a" * 10 + "\r\n" + "a" * 4, ["a" * 10, "\r\n" + "a" * 4]),
        ("a" * 9 + "👨‍👩", ["a" * 9, "👨‍👩"]),
        ("\u0301" * 15, ["\u0301" * 11, "\u0301" * 4]),  # accents without end are cut all the same
    ],
)
def test_cuts_prefer_paragraphs_then_lines_then_white_space(text: str, wanted: list[str]) -> None:
    assert cut_document(text, [by_characters], 12) == wanted  # 11 tokens and room for EOS


def test_the_tokenizer_with_most_tokens_decides() -> None:
    text = " ".join(["word"] * 100)
    segments = cut_document(text, [by_words, by_characters], 50)
    assert "".join(segments) == text
    assert max(map(len, segments)) <= 49
    assert all(by_words(segment).size <= 49 for segment in segments)


def test_a_cut_that_makes_more_tokens_is_moved() -> None:
    """A tokenizer whose tokens depend on what comes after: a whole run is one token, a cut run is one a character."""

    def greedy(text: str) -> np.ndarray:
        if text.endswith("b"):
            return np.array([len(text)], np.int32)
        return by_characters(text)

    text = "a" * 30 + "b" + "a" * 5
    segments = cut_document(text, [greedy], 8)
    assert "".join(segments) == text
    assert all(len(greedy(segment)) <= 7 for segment in segments)


def test_a_character_with_too_many_tokens_is_an_error() -> None:
    def three_each(text: str) -> np.ndarray:
        return np.repeat(by_characters(text), 3)

    with pytest.raises(CutError, match=r"character 0, 'ab', has more than 3 tokens.*raise shard\.max_length"):
        cut_document("ab", [three_each], 3)
    assert cut_document("ab", [three_each], 4) == ["a", "b"]


def test_a_segment_that_a_tokenizer_drops_is_an_error() -> None:
    with pytest.raises(CutError, match="have no tokens"):
        cut_document("word" + " " * 50 + "word", [by_words, by_characters], 12)


def test_work_is_linear_in_the_length_of_the_document() -> None:
    seen = 0

    def counting(text: str) -> np.ndarray:
        nonlocal seen
        seen += len(text)
        return by_characters(text)

    text = ("word " * 17 + "\n") * 1000
    assert "".join(cut_document(text, [counting], 200)) == text
    assert seen < 4 * len(text)


def test_text_that_a_tokenizer_packs_tightly_is_read_in_growing_windows() -> None:
    seen = 0

    def one_token(text: str) -> np.ndarray:
        nonlocal seen
        seen += len(text)
        return np.array([len(text.encode())], np.int32)

    text = "é" * 100_000
    assert cut_document(text, [one_token], 8) == [text]
    assert seen < 3 * len(text)
