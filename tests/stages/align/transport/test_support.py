import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.align.transport.support import target_support, union_support
from stages.align.vocabulary_maps import prefix_map, same_bytes
from stages.models.vocabulary import Vocabulary


def vocabulary(*tokens: bytes, special: tuple[bytes, ...] = ()) -> Vocabulary:
    """Return a hand-made vocabulary; ``<bos>`` and ``<eos>`` have their roles."""
    special = (b"<bos>", b"<eos>", *special)
    return Vocabulary(
        token_bytes=tokens,
        is_marked=np.array([token.startswith(b" ") for token in tokens], bool),
        is_special=np.array([token in special or not token for token in tokens], bool),
        bos_id=tokens.index(b"<bos>") if b"<bos>" in tokens else None,
        eos_id=tokens.index(b"<eos>") if b"<eos>" in tokens else None,
    )


def mapped(source: Vocabulary, target: Vocabulary, preferred=None) -> list[bytes | None]:
    found = prefix_map(source, target, preferred or {})
    return [None if token_id < 0 else target.token_bytes[token_id] for token_id in found]


def test_a_token_goes_to_itself_else_to_its_longest_prefix():
    target = vocabulary(b" inter", b" in", b" ", b"a", b"the")
    source = vocabulary(b" international", b" in", b" is", b"apple", b"the", b"them", b"zoo")
    assert mapped(source, target) == [b" inter", b" in", b" ", b"a", b"the", b"the", None]


def test_prefixes_are_compared_in_bytes():
    text = "日本".encode()
    target = vocabulary(text[:1], text[:2], b"x")
    source = vocabulary(text, text[:3], text[:1], text[1:])
    assert mapped(source, target) == [text[:2], text[:2], text[:1], None]


def test_special_tokens_go_by_role():
    target = vocabulary(b"<eos>", b"<bos>", b"<", b"<pad>", special=(b"<pad>",))
    source = vocabulary(b"<bos>", b"<eos>", b"<pad>", b"<mask>", b"<pa", special=(b"<pad>", b"<mask>"))
    assert mapped(source, target) == [b"<bos>", b"<eos>", b"<pad>", None, b"<"]


def test_a_role_that_the_target_lacks_is_not_mapped():
    assert mapped(vocabulary(b"<bos>", b"<eos>"), vocabulary(b"<", b"<eos>")) == [None, b"<eos>"]


def test_text_never_goes_to_a_special_token():
    assert mapped(vocabulary(b"<pad>"), vocabulary(b"<pad>", b"<p", special=(b"<pad>",))) == [b"<p"]


def test_ids_without_a_token_are_no_candidates():
    assert mapped(vocabulary(b"", b"a"), vocabulary(b"", b"b")) == [None, None]


def test_of_equal_tokens_the_preferred_one_is_found():
    target = vocabulary(b"\n", b"a", b"\n", b"\n\n")
    assert same_bytes(target) == {b"\n": [0, 2]}
    source = vocabulary(b"\n", b"\n\t")
    assert prefix_map(source, target, {b"\n": 0}).tolist() == [0, 0]
    assert prefix_map(source, target, {b"\n": 2}).tolist() == [2, 2]


@given(
    st.lists(st.binary(min_size=1, max_size=4), min_size=1, max_size=20),
    st.lists(st.binary(min_size=1, max_size=5), min_size=1, max_size=20),
)
@settings(max_examples=50)
def test_no_longer_prefix_is_missed(target_tokens, source_tokens):
    source = vocabulary(*source_tokens)
    for token, found in zip(source_tokens, mapped(source, vocabulary(*target_tokens)), strict=True):
        prefixes = [candidate for candidate in target_tokens if token.startswith(candidate)]
        assert found == max(prefixes, key=len, default=None)


def test_target_support_is_the_window_renormalised():
    ids, prior = target_support(np.array([[4, 2, -1]], np.int32), np.array([[0.6, 0.2, 0.0]]))
    assert ids.tolist() == [[4, 2, -1]]
    np.testing.assert_allclose(prior, [[0.75, 0.25, 0]])


def union(target_ids, target_probs, source_ids, first_token):
    ids, prior = union_support(
        np.array([target_ids], np.int32),
        np.array([target_probs], float),
        np.array([source_ids], np.int32),
        np.array(first_token, np.int32),
    )
    return ids[0].tolist(), prior[0]


def test_union_adds_each_new_token_once_with_half_the_least_prior():
    # Source candidates 0..3 begin with target tokens 7 (new), 5 (in the window), 7 (again), none.
    ids, prior = union([5, 6], [0.6, 0.2], [0, 1, 2, 3], [7, 5, 7, -1])
    assert ids == [5, 6, 7, -1, -1, -1]
    np.testing.assert_allclose(prior, np.array([0.6, 0.2, 0.1, 0, 0, 0]) / 0.9)


def test_union_skips_pads():
    ids, prior = union([5, -1], [0.5, 0.0], [0, -1], [9])
    assert ids == [5, 9, -1, -1]
    np.testing.assert_allclose(prior, np.array([0.5, 0.25, 0, 0]) / 0.75)


def test_union_without_target_candidates_is_empty():
    ids, prior = union([-1, -1], [0.0, 0.0], [0, 1], [3, 4])
    assert ids == [-1] * 4
    assert prior.tolist() == [0] * 4


@pytest.mark.parametrize("count", [0, 3])
def test_union_of_a_batch_equals_a_loop(count):
    rng = np.random.default_rng(0)
    target_ids = np.array([rng.choice(30, 4, replace=False) for _ in range(count)], np.int32).reshape(count, 4)
    target_probs = np.sort(rng.random((count, 4)))[:, ::-1].copy()
    source_ids = rng.integers(0, 10, (count, 5)).astype(np.int32)
    first_token = rng.integers(-1, 30, 10).astype(np.int32)
    ids, prior = union_support(target_ids, target_probs, source_ids, first_token)
    assert ids.shape == prior.shape == (count, 9)
    for index in range(count):
        one = union(target_ids[index], target_probs[index], source_ids[index], first_token)
        assert (ids[index].tolist(), prior[index].tolist()) == (one[0], one[1].tolist())
        assert abs(prior[index].sum() - 1) < 1e-12
