import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.align.pairing.token_pairing import (
    Pairing,
    boundary_pairing,
    choose_source,
    edit_distance_pairing,
)
from stages.contract.roles import Role, token_roles
from tests.stages.align.pairing.test_levenshtein import levenshtein

WORDS = st.lists(st.sampled_from(["", "a", "b", "ab", "the", "them", "日本", "日", "<bos>"]), min_size=1, max_size=5)


def pair(source, target) -> Pairing:
    """As if each token's text stood in the segment as it is."""
    return edit_distance_pairing(source, target, source_byte_end=ends(source), target_byte_end=ends(target))


def ends(texts) -> np.ndarray:
    return np.cumsum([len(text.encode()) for text in texts], dtype=np.int32)


def monotone_paths(n: int, m: int, at: tuple[int, int] = (0, 0)):
    """Yield every path from ``at`` to (n - 1, m - 1) by steps (1, 1), (1, 0) and (0, 1)."""
    if at == (n - 1, m - 1):
        yield [at]
        return
    for step in ((1, 1), (1, 0), (0, 1)):
        following = (at[0] + step[0], at[1] + step[1])
        if following[0] < n and following[1] < m:
            for rest in monotone_paths(n, m, following):
                yield [at, *rest]


def cost_of(path, source, target) -> int:
    return sum(levenshtein(source[k], target[j]) for k, j in path)


def brute_force(source, target) -> tuple[int, list[tuple[int, int]]]:
    """Return the cheapest of all paths; of equal ones the first when steps are compared from the end: diagonal, k-1, j-1."""
    preference = {(1, 1): 0, (1, 0): 1, (0, 1): 2}

    def from_the_end(path):
        steps = [(path[i][0] - path[i - 1][0], path[i][1] - path[i - 1][1]) for i in range(1, len(path))]
        return [preference[step] for step in reversed(steps)]

    paths = [
        (cost_of(path, source, target), from_the_end(path), path) for path in monotone_paths(len(source), len(target))
    ]
    cost, _, path = min(paths)
    return cost, path


def spans(path, num_target) -> list[tuple[int, int]]:
    return [(min(k for k, at in path if at == j), max(k for k, at in path if at == j) + 1) for j in range(num_target)]


@settings(max_examples=60)
@given(WORDS, WORDS)
def test_edit_distance_pairing_equals_the_best_of_all_paths(source, target):
    pairing = pair(source, target)
    cost, path = brute_force(source, target)
    assert pairing.cost == cost
    assert list(zip(pairing.start.tolist(), pairing.end.tolist(), strict=True)) == spans(path, len(target))


@settings(max_examples=60)
@given(
    st.lists(st.text("abc", max_size=3), min_size=1, max_size=30),
    st.lists(st.text("abc", max_size=3), min_size=1, max_size=30),
)
def test_edit_distance_pairing_is_monotone_and_covers_both_ends(source, target):
    pairing = pair(source, target)
    assert pairing.start[0] == 0
    assert pairing.end[-1] == len(source)
    assert (pairing.end > pairing.start).all()
    assert (np.diff(pairing.start) >= 0).all()
    assert (np.diff(pairing.end) >= 0).all()
    gap = pairing.start[1:] - pairing.end[:-1]
    assert ((gap == 0) | (gap == -1)).all()  # no source token is skipped; one at most is shared with the neighbour


@pytest.mark.parametrize(
    ("source", "target", "start", "end"),
    [
        (["the", "cat"], ["the", "cat"], [0, 1], [1, 2]),
        (["inter", "national"], ["international"], [0], [2]),
        (["international"], ["inter", "national"], [0, 0], [1, 1]),
        (["a"], ["a"], [0], [1]),
        (["x", "x", "x"], ["x", "x", "x"], [0, 1, 2], [1, 2, 3]),  # all paths along x cost nothing: the diagonal
        (["<bos>", "a", "<eos>"], ["a", "<eos>"], [0, 2], [2, 3]),
    ],
)
def test_edit_distance_pairing_of_known_sequences(source, target, start, end):
    pairing = pair(source, target)
    assert pairing.start.tolist() == start
    assert pairing.end.tolist() == end


def test_a_tie_steps_along_the_source_before_the_target():
    # Two paths cost 2: over (a, b) (a, a) (b, b) (a, b) and over (a, b) (b, b) (a, a) (a, b), source first. At the last
    # pair both (k-1, j) and (k, j-1) have cost 1; the former is taken, so the last target token has two source tokens.
    pairing = pair(["a", "b", "a"], ["b", "a", "b"])
    assert pairing.cost == 2
    assert list(zip(pairing.start.tolist(), pairing.end.tolist(), strict=True)) == [(0, 1), (0, 1), (1, 3)]


@pytest.mark.parametrize(("source", "target"), [([], ["a"]), (["a"], []), ([], [])])
def test_an_empty_side_pairs_nothing(source, target):
    pairing = pair(source, target)
    assert pairing.start.tolist() == pairing.end.tolist() == [-1] * len(target)
    assert not pairing.is_paired.any()


def test_long_tokens_pair_by_their_whole_text():
    pairing = pair([" " * 300, "x"], ["x", " " * 299, "x"])
    assert pairing.start.tolist() == [0, 0, 1]
    assert pairing.cost == 300 + 1


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_boundary_pairing_takes_the_last_text_position_that_ends_there(seed):
    rng = np.random.default_rng(seed)
    length = int(rng.integers(1, 20))
    ends = [np.sort(rng.integers(0, length + 1, rng.integers(1, 15))) for _ in range(2)]
    text = [np.zeros(len(part), np.uint8) for part in ends]
    pairing = boundary_pairing(ends[0], ends[1], source_roles=text[0], target_roles=text[1])
    for j, end in enumerate(ends[1]):
        same = [k for k, at in enumerate(ends[0]) if at == end]
        assert pairing.start[j] == (same[-1] if same else -1)
        assert pairing.end[j] == (same[-1] + 1 if same else -1)


def test_special_tokens_pair_by_role():
    source = [0, 2, 5, 5]  # BOS, two texts, EOS
    target = [0, 0, 5, 5]  # BOS, a text token without bytes, a text, EOS
    roles = np.array([Role.BOS, Role.TEXT, Role.TEXT, Role.EOS], np.uint8)
    pairing = boundary_pairing(np.array(source), np.array(target), source_roles=roles, target_roles=roles)
    assert pairing.start.tolist() == [0, -1, 2, 3]
    without_bos = boundary_pairing(np.array(source), np.array(target[1:]), source_roles=roles, target_roles=roles[1:])
    assert without_bos.start.tolist() == [-1, 2, 3]
    without_special = boundary_pairing(
        np.array(source[1:3]), np.array(target), source_roles=roles[1:3], target_roles=roles
    )
    assert without_special.start.tolist() == [-1, -1, 1, -1]


@pytest.mark.parametrize(
    ("ids", "prefix_id", "eos_id", "expected"),
    [
        ([1, 7, 2], 1, 2, [Role.BOS, Role.TEXT, Role.EOS]),
        ([7, 8], None, 2, [Role.TEXT, Role.TEXT]),
        ([0, 7, 0], 0, 0, [Role.BOS, Role.TEXT, Role.EOS]),  # one id in both roles
        ([7, 0], None, 0, [Role.TEXT, Role.EOS]),
        ([0], 0, 0, [Role.BOS]),
        ([7, 2, 8], None, 2, [Role.TEXT, Role.TEXT, Role.TEXT]),  # its name inside the text
        ([], 1, 2, []),
    ],
)
def test_roles_go_by_place_and_id(ids, prefix_id, eos_id, expected):
    roles = token_roles(np.array(ids, np.int32), prefix_id=prefix_id, eos_id=eos_id)
    assert roles.tolist() == expected


def choose(start, end, source_end, target_end, source_roles=None, target_roles=None):
    pairing = Pairing(np.array(start, np.int32), np.array(end, np.int32), 0)
    position, exact = choose_source(
        pairing,
        np.array(source_end),
        np.array(target_end),
        source_roles=np.array(source_roles or [0] * len(source_end), np.uint8),
        target_roles=np.array(target_roles or [0] * len(target_end), np.uint8),
    )
    return position.tolist(), exact.tolist()


def test_the_group_s_position_with_the_same_boundary_is_taken():
    assert choose([0], [3], [2, 5, 7], [5]) == ([1], [True])
    assert choose([0], [3], [2, 5, 5], [5]) == ([2], [True])  # the last of several


def test_a_group_without_the_boundary_gives_its_last_inexactly():
    assert choose([0], [3], [2, 4, 7], [5]) == ([2], [False])


def test_the_boundary_outside_the_group_does_not_count():
    assert choose([0, 1], [1, 2], [5, 7], [3, 5]) == ([0, 1], [False, False])


def test_equal_ends_of_different_roles_are_not_the_same_context():
    assert choose([1], [2], [5, 5], [5], [Role.TEXT, Role.EOS], [Role.TEXT]) == ([1], [False])
    assert choose([0], [2], [5, 5], [5], [Role.TEXT, Role.EOS], [Role.TEXT]) == ([0], [True])


def test_unpaired_positions_take_nothing():
    assert choose([-1, 0], [-1, 1], [3], [2, 3]) == ([-1, 0], [False, True])


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        ([0, 1, 2], [1, 2, 3], [False, False, False]),
        ([0, 0, 1], [1, 1, 2], [True, True, False]),
        ([0, 1], [2, 3], [True, True]),
        ([0, -1, 0], [1, -1, 1], [True, False, True]),
        ([], [], []),
    ],
)
def test_positions_that_share_a_source_token_know_it(start, end, expected):
    assert Pairing(np.array(start, np.int32), np.array(end, np.int32), 0).shares_source().tolist() == expected
