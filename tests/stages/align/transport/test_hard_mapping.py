import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.align.transport import hard_mapping
from stages.align.transport.hard_mapping import NearestTokens, hard_plan
from stages.align.vocabulary_maps import exact_map
from tests.stages.align.pairing.test_levenshtein import levenshtein
from tests.stages.align.transport.test_support import vocabulary


def nearest_tokens(source, target, preferred=None) -> NearestTokens:
    return NearestTokens(
        source,
        target,
        source_texts=[source.text(i) for i in range(source.size)],
        target_texts=[target.text(i) for i in range(target.size)],
        exact=exact_map(source, target, preferred or {}),
        preferred=preferred or {},
    )


def brute_force(source, target, token_id: int, window=()) -> tuple[int, int]:
    """(target id, distance) by a loop over the whole vocabulary; the window's order decides first, then the lower id."""
    if source.is_special[token_id] or not source.token_bytes[token_id]:
        same = [i for i in range(target.size) if target.is_special[i] and target.token_bytes[i]]
        same = [i for i in same if target.token_bytes[i] == source.token_bytes[token_id]]
        return (same[0], 0) if same else (-1, 0)
    ordinary = [i for i in range(target.size) if target.token_bytes[i] and not target.is_special[i]]
    distance = {i: levenshtein(source.text(token_id), target.text(i)) for i in ordinary}
    if not distance:
        return -1, 0
    least = min(distance.values())
    tied = [i for i in ordinary if distance[i] == least]
    return next((i for i in window if i in tied), tied[0]), least


def test_exact_takes_tokens_of_the_same_bytes_and_special_ones_by_role():
    target = vocabulary(b"<eos>", b"<bos>", b" in", b"in", b"<pad>", b"\xe6", special=(b"<pad>",))
    source = vocabulary(b"in", b" in", b" i", b"<eos>", b"<pad>", b"\xe6", b"", b"<bos>")
    # The source's "<pad>" is ordinary text and is not the target's special token of that name.
    assert exact_map(source, target, {}).tolist() == [3, 2, -1, 0, -1, 5, -1, 1]


def test_of_equal_tokens_exact_takes_the_preferred_one():
    target = vocabulary(b"a", b"b", b"a")
    assert exact_map(vocabulary(b"a"), target, {b"a": 0}).tolist() == [0]
    assert exact_map(vocabulary(b"a"), target, {b"a": 2}).tolist() == [2]


def test_an_empty_vocabulary_maps_nothing():
    assert exact_map(vocabulary(), vocabulary(b"a"), {}).shape == (0,)


def test_nearest_is_of_the_whole_vocabulary_not_of_the_window():
    source, target = vocabulary(b"fusing"), vocabulary(b"refuse", b"fusion", b"using")
    found = nearest_tokens(source, target).map(np.array([[0]]), np.array([[0, 1]]), np.array([[[4.0, 2.0]]]))
    assert found.tolist() == [[2]]


def test_ties_go_to_the_window_s_highest_then_to_the_lowest_id():
    source, target = vocabulary(b"cat"), vocabulary(b"dog", b"bat", b"hat", b"rat")
    nearest = nearest_tokens(source, target)

    def mapped(*window: int) -> int:
        costs = np.array([[[float(levenshtein("cat", target.text(i))) for i in window]]])
        return int(nearest.map(np.array([[0]]), np.array([window]), costs)[0, 0])

    assert mapped(0) == 1
    assert mapped(0, 3, 2) == 3
    assert mapped(2, 3) == 2


def test_special_tokens_are_never_nearest_to_text():
    target = vocabulary(b"<pad>", b"<padding>", special=(b"<pad>",))
    nearest = nearest_tokens(vocabulary(b"<pad>"), target)
    assert nearest.map(np.array([[0]]), np.array([[0]]), np.zeros((1, 1, 1))).tolist() == [[1]]
    assert nearest.nearest(np.array([0]))[1].tolist() == [4]


def test_pads_and_special_tokens_without_counterpart_are_not_mapped():
    source = vocabulary(b"<bos>", b"<eos>", b"", b"x")
    nearest = nearest_tokens(source, vocabulary(b"y", b"<eos>"))
    ids, distances = nearest.nearest(np.array([[0, 1, 2, 3, -1]]))
    assert ids.tolist() == [[-1, 1, -1, 0, -1]]
    assert distances.tolist() == [[0, 0, 0, 1, 0]]


def test_a_target_without_text_maps_nothing():
    ids, _ = nearest_tokens(vocabulary(b"a", b"bc"), vocabulary(b"<eos>")).nearest(np.array([0, 1]))
    assert ids.tolist() == [-1, -1]


def test_texts_longer_than_a_byte_counts_are_compared():
    source, target = vocabulary(b"a" * 300, b" " * 70_000), vocabulary(b"a" * 290 + b"b", b"a" * 20, b" " * 69_999)
    ids, distances = nearest_tokens(source, target).nearest(np.array([0, 1]))
    assert ids.tolist() == [0, 2]
    assert distances.tolist() == [10, 1]


tokens = st.lists(
    st.one_of(st.text("ab é", min_size=1, max_size=6).map(str.encode), st.binary(min_size=1, max_size=3)),
    min_size=1,
    max_size=25,
    unique=True,
)


@settings(max_examples=60)
@given(tokens, tokens, st.integers(0, 2**32 - 1))
def test_nearest_equals_a_loop_over_the_vocabulary(source_tokens, target_tokens, seed):
    source = vocabulary(b"<eos>", *source_tokens)
    target = vocabulary(*target_tokens, b"<eos>")
    rng = np.random.default_rng(seed)
    window = rng.permutation(target.size)[:4]
    ids = np.arange(source.size)[None]
    costs = np.array([[[float(levenshtein(source.text(i), target.text(y))) for y in window] for i in ids[0]]])
    found = nearest_tokens(source, target).map(ids, window[None], costs)[0]
    plain_ids, distances = nearest_tokens(source, target).nearest(ids[0])
    for token_id in ids[0]:
        assert (plain_ids[token_id], distances[token_id]) == brute_force(source, target, token_id)
        assert found[token_id] == brute_force(source, target, token_id, window.tolist())[0]


def test_earlier_lookups_and_block_sizes_do_not_change_the_nearest_tokens(monkeypatch):
    rng = np.random.default_rng(1)
    words = {bytes(rng.choice(list(b"abcd "), size=rng.integers(1, 7))) for _ in range(300)}
    words = sorted(words)
    source, target = vocabulary(*words[::2]), vocabulary(*words[1::2])
    whole = nearest_tokens(source, target).nearest(np.arange(source.size))
    monkeypatch.setattr(hard_mapping, "_BLOCK_CELLS", 7)
    one_by_one = nearest_tokens(source, target)
    for token_id in rng.permutation(source.size):
        ids, distances = one_by_one.nearest(np.array([token_id]))
        assert (ids[0], distances[0]) == (whole[0][token_id], whole[1][token_id])


def test_a_hard_plan_moves_each_candidate_whole():
    support, plan = hard_plan(np.array([[5, 9, 5, -1]], np.int32), np.array([[0.4, 0.3, 0.2, 0.1]]))
    assert support.tolist() == [[5, 9, -1, -1]]
    assert plan[0].tolist() == [[0.4, 0, 0, 0], [0, 0.3, 0, 0], [0.2, 0, 0, 0], [0, 0, 0, 0]]


def test_a_candidate_without_mass_names_no_token():
    support, plan = hard_plan(np.array([[5, 6]], np.int32), np.array([[0.0, 0.5]]))
    assert support.tolist() == [[6, -1]]
    assert plan.sum() == pytest.approx(0.5)
