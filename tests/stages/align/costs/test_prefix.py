import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.align.costs.edit_distance import EditDistanceCosts
from stages.align.costs.prefix import PrefixCosts
from stages.align.transport.moved_mass import moved_share, text_numbers
from tests.stages.align.pairing.test_levenshtein import levenshtein
from tests.stages.align.transport.test_support import vocabulary


def prefix_costs(source, target) -> np.ndarray:
    """(V of the source, V of the target)"""
    distances = EditDistanceCosts(*([part.text(i) for i in range(part.size)] for part in (source, target)))
    costs = PrefixCosts(source, target, distances)
    return costs.costs(np.arange(source.size)[None], np.arange(target.size)[None])[0]


def test_a_beginning_costs_a_tenth_a_byte_and_all_else_its_edits():
    source = vocabulary(b" inter", b"inter", "é".encode())
    target = vocabulary(b" international", b" inter", b" i", b" outer", "école".encode(), "é".encode()[:1])
    found = prefix_costs(source, target)
    np.testing.assert_allclose(found[0], [0.8, 0, 0.4, 2, levenshtein(" inter", "école"), 6])
    assert found[1, 0] == levenshtein("inter", " international")  # the boundary is a character like any other
    np.testing.assert_allclose(found[2], [14, 6, 2, 6, 0.4, 0.1])  # bytes, not characters; 5 characters, 6 bytes


def test_special_tokens_begin_nothing():
    source, target = vocabulary(b"<eos>", b"<"), vocabulary(b"<", b"<eos>", b"<bos>")
    assert prefix_costs(source, target).tolist() == [[4, 0, 1], [0, 4, 4]]


def test_pads_cost_nothing():
    part = vocabulary(b"ab", b"abc")
    costs = PrefixCosts(part, part, EditDistanceCosts(["ab", "abc"], ["ab", "abc"]))
    found = costs.costs(np.array([[0, -1]]), np.array([[1, -1]]))
    np.testing.assert_allclose(found, [[[0.1, 0], [0, 0]]])


words = st.lists(st.text("ab ç", min_size=1, max_size=6).map(str.encode), min_size=1, max_size=8, unique=True)


@settings(max_examples=60, deadline=None)
@given(words, words)
def test_prefix_costs_equal_their_definition(source_words, target_words):
    source, target = vocabulary(*source_words), vocabulary(*target_words)
    found = prefix_costs(source, target)
    for x, one in enumerate(source_words):
        for y, other in enumerate(target_words):
            begins = one.startswith(other) or other.startswith(one)
            expected = 0.1 * abs(len(one) - len(other)) if begins else levenshtein(one.decode(), other.decode())
            assert found[x, y] == pytest.approx(expected)


def test_text_numbers_are_equal_where_tokens_stand_for_the_same():
    source = vocabulary(b"a", b"<eos>", b"<pad>", b"", b"b")
    target = vocabulary(b"<eos>", b"<pad>", b"a", b"", b"c", b"a", special=(b"<pad>",))
    one, other = text_numbers(source, target)
    same = [[x, y] for x in range(source.size) for y in range(target.size) if one[x] == other[y] >= 0]
    assert same == [[0, 2], [0, 5], [1, 0]]  # the source's "<pad>" is text
    assert one[3] == other[3] == -1


def test_moved_share_counts_what_lands_on_another_text():
    plan = np.array([[[0.3, 0.1], [0.2, 0.4]], [[0.0, 0.0], [0.0, 0.0]]])
    source, support = np.array([[1, 2], [1, 2]]), np.array([[1, 2], [1, 2]])
    np.testing.assert_allclose(moved_share(plan, source, support, largest_only=False), [0.3, 0])
    np.testing.assert_allclose(moved_share(plan, source, support, largest_only=True), [0, 0])
    crossed = support[:, ::-1]
    np.testing.assert_allclose(moved_share(plan, source, crossed, largest_only=False), [0.7, 0])
    np.testing.assert_allclose(moved_share(plan, source, crossed, largest_only=True), [1, 0])
