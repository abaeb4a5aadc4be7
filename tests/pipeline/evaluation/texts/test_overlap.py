"""What documents share with a training text, counted by hand and by brute force."""

import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.texts.overlap import NGRAM, Overlap, OverlapIndex, words

NUMBERS = [f"w{number}" for number in range(40)]
SENTENCES = st.text("ab", max_size=30).map(" ".join)
"""Words of which there are two, so that passages meet."""


def overlaps(documents: list[str], *training: list[str]) -> list[Overlap]:
    index = OverlapIndex(documents)
    for part in training:
        index.read(part)
    return index.overlaps()


def test_a_copy_with_other_white_space_is_equal() -> None:
    copy = "\n".join(NUMBERS) + "\n"
    assert overlaps([" ".join(NUMBERS)], ["something else", copy]) == [Overlap(is_equal=True, share=1.0)]
    assert overlaps(["Too short"], ["Too  short\n"]) == [Overlap(is_equal=True, share=0.0)]
    assert overlaps(["Too short"], ["It is Too short here"]) == [Overlap(is_equal=False, share=0.0)]


def test_a_shared_passage_counts_by_its_ngrams() -> None:
    # 40 words are 28 13-grams; of a passage of 20 words of them, 8 are in the training text.
    passage = " ".join(["before", *NUMBERS[5:25], "after"])
    assert overlaps([" ".join(NUMBERS)], [passage]) == [Overlap(is_equal=False, share=8 / 28)]


def test_twelve_shared_words_are_no_overlap_and_thirteen_are() -> None:
    document = " ".join(NUMBERS)
    assert overlaps([document], [" ".join(NUMBERS[3:15])]) == [Overlap(is_equal=False, share=0.0)]
    assert overlaps([document], [" ".join(NUMBERS[3:16])]) == [Overlap(is_equal=False, share=1 / 28)]


def test_case_and_punctuation_do_not_hide_a_passage() -> None:
    training = ", ".join(NUMBERS).upper() + "!"
    assert overlaps([" ".join(NUMBERS)], [training])[0].share == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("हिन्दी में यह एक वाक्य है।", ["हिन्दी", "में", "यह", "एक", "वाक्य", "है"]),
        ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
        ("ภาษา日本語", [*"ภาษา", *"日本語"]),
        ("I ❤️ you 👨‍👩‍👧 so 1️⃣", ["i", "you", "so", "1"]),
        ("می‌خواهم co\u00adop", ["میخواهم", "coop"]),
        ("naïve, snake_case don't", ["naïve", "snake_case", "don", "t"]),
    ],
)
def test_marks_belong_to_their_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_how_characters_are_composed_makes_no_difference() -> None:
    text = " ".join(f"à{number}é" for number in range(20))
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert composed != decomposed
    assert overlaps([composed], [decomposed]) == [Overlap(is_equal=True, share=1.0)]
    assert overlaps([composed], [f"{decomposed} more"]) == [Overlap(is_equal=False, share=1.0)]


def test_no_passage_reaches_over_two_training_documents_or_shards() -> None:
    halves = [" ".join(NUMBERS[:12]), " ".join(NUMBERS[12:24])]
    assert overlaps([" ".join(NUMBERS[:24])], halves) == [Overlap(is_equal=False, share=0.0)]
    assert overlaps([" ".join(NUMBERS[:24])], [halves[0]], [halves[1]]) == [Overlap(is_equal=False, share=0.0)]


def test_the_whole_document_is_compared_and_the_scored_part_too() -> None:
    whole = " ".join(NUMBERS)
    index = OverlapIndex(["w0 w1"], [whole])
    index.read([whole])
    assert index.overlaps() == [Overlap(is_equal=True, share=0.0)]
    index = OverlapIndex(["w0 w1"], [whole])
    index.read(["w0 w1"])
    assert index.overlaps() == [Overlap(is_equal=True, share=0.0)]


def test_scripts_without_spaces_are_compared_character_by_character() -> None:
    text = "東京都は日本の首都であり人口が多い都市です"
    assert len(words(text)) == len(text)
    assert overlaps([text], [f"はい、{text}。"])[0].share == 1.0
    assert words("Don't 5 straße") == ["don", "t", "5", "straße"]


def test_nothing_to_compare_with_is_no_overlap() -> None:
    assert overlaps([" ".join(NUMBERS)]) == [Overlap(is_equal=False, share=0.0)]
    assert overlaps([" ".join(NUMBERS)], [], ["", "x"]) == [Overlap(is_equal=False, share=0.0)]
    assert overlaps([], ["x"]) == []


@settings(max_examples=60)
@given(
    st.lists(SENTENCES, max_size=3),
    st.lists(st.lists(SENTENCES, max_size=3), max_size=3),
)
def test_shares_are_those_of_brute_force(documents: list[str], shards: list[list[str]]) -> None:
    known = {gram for shard in shards for text in shard for gram in ngrams(text)}
    expected = [sum(gram in known for gram in ngrams(text)) / max(1, len(ngrams(text))) for text in documents]
    assert [found.share for found in overlaps(documents, *shards)] == pytest.approx(expected)


def ngrams(text: str) -> list[str]:
    found = text.split()
    return [" ".join(found[start : start + NGRAM]) for start in range(len(found) - NGRAM + 1)]


def test_the_reference_count_is_right_on_an_example() -> None:
    grams = ngrams(" ".join(NUMBERS))
    assert len(grams) == 28
    assert all(one.split()[1:] == other.split()[:-1] for one, other in pairwise(grams))
