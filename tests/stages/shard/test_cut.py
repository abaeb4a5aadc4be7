"""Cuts fit every tokenizer and lose nothing."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from stages.models.config import ModelConfig
from stages.models.tokenizer import Measured, SegmentTokenizer
from stages.shard.cut import CutError, _preferred_cut, cut_document
from tests.texts import texts
from tests.tiny_tokenizers import FAMILIES, TEXTS, save_tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SegmentTokenizer]:
    def load(family: str, folder: Path) -> SegmentTokenizer:
        return SegmentTokenizer.load(ModelConfig(name=family, path=save_tokenizer(family, folder)))

    return {family: load(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


ByteEnd = Callable[[str], np.ndarray]


def ends_of(tokenizer: SegmentTokenizer) -> ByteEnd:
    return lambda text: tokenizer.encode(text, is_last=False).byte_end


def cut(text: str, byte_ends: Sequence[ByteEnd], max_length: int) -> list[str]:
    """Segments under tokenizers that are given as text -> byte_end."""

    def measure(byte_end: ByteEnd) -> Callable[[str], Measured]:
        def measured(piece: str) -> Measured:
            found = byte_end(piece)
            return Measured(len(found), len(found) > 0 and found[-1] > 0, lambda: found)

        return measured

    return cut_document(text, [measure(byte_end) for byte_end in byte_ends], max_length).segments


def cut_by_byte_ends(text: str, byte_ends: Sequence[ByteEnd], max_length: int) -> list[str]:
    """Apply the rule in its plainest form, with every byte_end computed: what ``cut_document`` must agree with."""

    def fitting(piece: str) -> int:
        for byte_end in byte_ends:
            ends = byte_end(piece)
            if len(ends) >= max_length:
                shorter = piece.encode()[: ends[max_length - 2]].decode(errors="ignore")
                piece = shorter if len(shorter) < len(piece) else piece[:-1]
        return len(piece)

    segments, start, window = [], 0, 4 * max_length
    while start < len(text):
        while (size := fitting(text[start : start + window])) == window and start + window < len(text):
            window *= 2
        piece = text[start : start + window]
        while size < len(piece):
            wanted = _preferred_cut(piece, size) if size else 0
            size = fitting(piece[:wanted])
            if size == wanted:
                break
        if not size or any(byte_end(piece[:size])[-1:].sum() == 0 for byte_end in byte_ends):
            raise CutError(f"no cut at {start}")
        segments.append(piece[:size])
        start += size
        window = size + size // 4 + 16
    return segments


def by_characters(text: str) -> np.ndarray:
    """Return a tokenizer with one token a character."""
    return np.cumsum([len(character.encode()) for character in text], dtype=np.int32)


def by_words(text: str) -> np.ndarray:
    """Return a tokenizer that keeps words alone."""
    ends, end = [], 0
    for word in text.split():
        end = text.index(word, end) + len(word)
        ends.append(len(text[:end].encode()))
    if ends:
        ends[-1] = len(text.encode())
    return np.array(ends, np.int32)


@settings(max_examples=150)
@given(parts=st.lists(texts, min_size=1, max_size=6), max_length=st.integers(10, 40))
def test_segments_concatenate_to_the_document_and_fit_every_tokenizer(
    parts: list[str], max_length: int, tokenizers: dict[str, SegmentTokenizer]
) -> None:
    text = "".join(parts) or "x"
    try:
        segments, counts = cut_document(text, [tokenizer.measure for tokenizer in tokenizers.values()], max_length)
    except CutError:
        reject()  # white space that one drops, or a character that NFKC makes many of; Hypothesis fails if it is common
    assert "".join(segments) == text
    assert all(segments)
    for tokenizer, count in zip(tokenizers.values(), counts, strict=True):
        found = tokenizer.count_batch(segments)
        assert max(found) <= max_length
        assert sum(found) == count + len(segments) * (tokenizer.vocabulary.eos_id is not None)


@settings(max_examples=150)
@given(parts=st.lists(texts, min_size=1, max_size=8), max_length=st.integers(6, 40), family=st.sampled_from(FAMILIES))
def test_cuts_are_those_of_the_rule_in_few_words(
    parts: list[str], max_length: int, family: str, tokenizers: dict[str, SegmentTokenizer]
) -> None:
    text = "".join(parts) or "x"
    chosen = [tokenizers[family], tokenizers["byte-bpe"]]
    outcomes: list[list[str] | None] = []
    for way in (
        lambda: cut_document(text, [tokenizer.measure for tokenizer in chosen], max_length).segments,
        lambda: cut_by_byte_ends(text, [ends_of(tokenizer) for tokenizer in chosen], max_length),
    ):
        try:
            outcomes.append(way())
        except CutError:
            outcomes.append(None)
    assert outcomes[0] == outcomes[1]


@settings(max_examples=100)
@given(parts=st.lists(texts, min_size=1, max_size=8), max_length=st.integers(8, 30))
def test_byte_tokenizers_cut_every_document(
    parts: list[str], max_length: int, tokenizers: dict[str, SegmentTokenizer]
) -> None:
    text = "".join(parts) or "x"
    pair = [tokenizers["byte-bpe"], tokenizers["spm-bpe"]]
    segments = cut_document(text, [tokenizer.measure for tokenizer in pair], max_length).segments
    assert "".join(segments) == text
    assert max(tokenizer.count(segment) for tokenizer in pair for segment in segments) <= max_length


def test_a_document_that_fits_stays_whole(tokenizers: dict[str, SegmentTokenizer]) -> None:
    measures = [tokenizer.measure for tokenizer in tokenizers.values()]
    assert cut_document(TEXTS[0], measures, 500).segments == [TEXTS[0]]


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
    assert cut(text, [by_characters], 12) == wanted  # 11 tokens and room for EOS


def test_the_tokenizer_with_most_tokens_decides() -> None:
    text = " ".join(["word"] * 100)
    segments = cut(text, [by_words, by_characters], 50)
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
    segments = cut(text, [greedy], 8)
    assert "".join(segments) == text
    assert all(len(greedy(segment)) <= 7 for segment in segments)


def test_a_character_with_too_many_tokens_is_an_error() -> None:
    def three_each(text: str) -> np.ndarray:
        return np.repeat(by_characters(text), 3)

    with pytest.raises(CutError, match=r"character 0, 'ab', has more than 3 tokens.*raise shard\.max_length"):
        cut("ab", [three_each], 3)
    assert cut("ab", [three_each], 4) == ["a", "b"]


def test_a_segment_that_a_tokenizer_drops_is_an_error() -> None:
    with pytest.raises(CutError, match="have no tokens"):
        cut("word" + " " * 50 + "word", [by_words, by_characters], 12)


def test_work_is_linear_in_the_length_of_the_document() -> None:
    seen = 0

    def counting(text: str) -> np.ndarray:
        nonlocal seen
        seen += len(text)
        return by_characters(text)

    text = ("word " * 17 + "\n") * 1000
    assert "".join(cut(text, [counting], 200)) == text
    assert seen < 4 * len(text)


def test_text_that_a_tokenizer_packs_tightly_is_read_in_growing_windows() -> None:
    seen = 0

    def one_token(text: str) -> np.ndarray:
        nonlocal seen
        seen += len(text)
        return np.array([len(text.encode())], np.int32)

    text = "é" * 100_000
    assert cut(text, [one_token], 8) == [text]
    assert seen < 3 * len(text)
