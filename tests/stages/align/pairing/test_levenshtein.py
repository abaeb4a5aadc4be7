import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from stages.align.costs.edit_distance import EditDistanceCosts
from stages.align.pairing.levenshtein import levenshtein_matrix


def levenshtein(a: str, b: str) -> int:
    """Compute a distance by the textbook recurrence."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


TEXTS = [
    "",
    " ",
    "a",
    " the",
    "the",
    "The",
    "日本",
    " 日",
    "naïve",
    "naive",
    b"\xe6\x97".decode(errors="surrogateescape"),
]


def test_matrix_equals_the_recurrence():
    found = levenshtein_matrix(TEXTS, TEXTS)
    assert found.tolist() == [[levenshtein(a, b) for b in TEXTS] for a in TEXTS]


@given(st.lists(st.text(max_size=6), max_size=5), st.lists(st.text(max_size=6), max_size=5))
def test_matrix_equals_the_recurrence_on_any_text(rows, columns):
    found = levenshtein_matrix(rows, columns)
    assert found.shape == (len(rows), len(columns))
    assert found.tolist() == [[levenshtein(a, b) for b in columns] for a in rows]


@given(st.lists(st.text("ab ", max_size=40), max_size=8), st.lists(st.text("ab ", max_size=40), max_size=8))
def test_matrix_equals_rapidfuzz_on_texts_shorter_and_longer_than_a_word(rows, columns):
    assert levenshtein_matrix(rows, columns).tolist() == [[Levenshtein.distance(a, b) for b in columns] for a in rows]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 65])
def test_distances_are_right_for_texts_that_fill_a_word(length):
    columns = ["a" * length, "b" * length, "ab" * (length // 2) + "a" * (length % 2), "a" * (length - 1), "", "x"]
    rows = [*columns, "\U0010ffff" * length, "b" + "a" * length]
    assert levenshtein_matrix(rows, columns).tolist() == [[levenshtein(a, b) for b in columns] for a in rows]


def test_a_byte_outside_a_character_is_one_edit():
    first, second = (raw.decode(errors="surrogateescape") for raw in (b"\xe6\x97", b"\xe6\x98"))
    assert levenshtein_matrix([first], [second, first, "日"]).tolist() == [[1, 0, 2]]


@pytest.mark.parametrize(("length", "dtype"), [(255, np.uint8), (256, np.uint16), (65536, np.int32)])
def test_matrix_is_wide_enough_for_its_longest_text(length, dtype):
    found = levenshtein_matrix(["x" * length], ["", "y"])
    assert found.dtype == dtype
    assert found.tolist() == [[length, length]]


def test_space_is_an_ordinary_character_of_a_cost():
    costs = EditDistanceCosts(["he", " he"], [" he", "he", "she"]).costs(np.array([[0, 1]]), np.array([[0, 1, 2]]))
    assert costs.tolist() == [[[1, 0, 1], [0, 1, 1]]]


def test_costs_are_zero_at_pads():
    distances = EditDistanceCosts(["ab", "cd"], ["ab", "xyz"])
    costs = distances.costs(np.array([[0, -1]]), np.array([[1, -1]]))
    assert costs.tolist() == [[[3, 0], [0, 0]]]
    assert distances.num_cached == 1


def test_costs_repeat_from_the_cache():
    distances = EditDistanceCosts(TEXTS, TEXTS)
    ids = np.arange(len(TEXTS))[None]
    first = distances.costs(ids, ids)
    cached = distances.num_cached
    assert cached == len(TEXTS) ** 2
    assert (distances.costs(ids, ids) == first).all()
    assert distances.num_cached == cached


@pytest.mark.parametrize("num_slots", [2, 8, 64, 4096])
def test_a_full_cache_gives_the_same_costs(num_slots):
    rng = np.random.default_rng(0)
    distances = EditDistanceCosts(TEXTS, TEXTS, num_slots=num_slots)
    for _ in range(20):
        source, target = rng.integers(-1, len(TEXTS), (3, 4)), rng.integers(-1, len(TEXTS), (3, 5))
        expected = np.zeros((3, 4, 5))
        for problem, x, y in np.ndindex(expected.shape):
            if source[problem, x] >= 0 and target[problem, y] >= 0:
                expected[problem, x, y] = levenshtein(TEXTS[source[problem, x]], TEXTS[target[problem, y]])
        assert (distances.costs(source, target) == expected).all()
        assert distances.num_cached <= num_slots // 2


def test_no_problem_has_no_costs():
    empty = np.zeros((0, 3), np.int32)
    assert EditDistanceCosts(TEXTS, TEXTS).costs(empty, empty).shape == (0, 3, 3)


def test_a_number_of_slots_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="power of two"):
        EditDistanceCosts(TEXTS, TEXTS, num_slots=12)
