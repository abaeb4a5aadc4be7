"""The choice of documents: spread over kinds, and the same each time."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.texts.choose import choose_documents, shorten

KINDS = ["law"] * 50 + ["news"] * 30 + ["poem"] * 2 + ["code"] * 18


def by_kind(chosen: list[int]) -> Counter:
    return Counter(KINDS[number] for number in chosen)


def test_every_document_is_chosen_by_default() -> None:
    assert choose_documents(KINDS) == list(range(100))


def test_a_number_is_shared_equally_and_what_a_small_kind_lacks_goes_to_the_others() -> None:
    assert by_kind(choose_documents(KINDS, num_documents=20)) == {"poem": 2, "code": 6, "news": 6, "law": 6}
    assert by_kind(choose_documents(KINDS, num_documents=3)) == {"code": 1, "law": 1, "news": 1}
    assert choose_documents(KINDS, num_documents=1000) == list(range(100))


def test_a_share_is_taken_of_each_kind_and_at_least_one_document() -> None:
    assert by_kind(choose_documents(KINDS, fraction=0.1)) == {"law": 5, "news": 3, "poem": 1, "code": 2}


def test_the_choice_is_the_same_each_time_and_not_the_first_documents() -> None:
    chosen = choose_documents(["x"] * 1000, num_documents=5)
    assert chosen == choose_documents(["x"] * 1000, num_documents=5)
    assert chosen == [607, 634, 669, 906, 958], "the choice of earlier versions stays"
    more = choose_documents(["x"] * 1000, num_documents=9)
    assert set(chosen) < set(more), "a larger number adds documents"


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=60), st.integers(1, 80))
def test_as_many_are_chosen_as_there_can_be_and_no_kind_is_behind_by_more_than_one(
    kinds: list[str], total: int
) -> None:
    chosen = choose_documents(kinds, num_documents=total)
    assert len(chosen) == len(set(chosen)) == min(total, len(kinds))
    taken, there = Counter(kinds[number] for number in chosen), Counter(kinds)
    for kind in there:
        assert taken[kind] == there[kind] or taken[kind] >= max(taken.values()) - 1


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("one two three", None, "one two three"),
        ("one two three", 13, "one two three"),
        ("one two three", 12, "one two"),
        ("one two three", 7, "one two"),
        ("one two three", 6, "one tw"),
        ("one\ntwo", 4, "one"),
        ("unbroken", 3, "unb"),
    ],
    ids=["no limit", "fits", "at white space", "before white space", "too far back", "a line", "no white space"],
)
def test_a_document_is_cut_at_white_space(text: str, limit: int | None, expected: str) -> None:
    assert shorten(text, limit) == expected
