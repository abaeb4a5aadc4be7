import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.contract.columns import PAD_ID
from stages.fuse.mix import Candidate, as_candidate, mix, without
from tests.stages.fuse.test_weights import rows


def candidate(*dicts: dict[int, float], tail: list[float] | None = None) -> Candidate:
    return Candidate(rows(*dicts), np.zeros(len(dicts)) if tail is None else np.array(tail))


def as_dicts(sparse) -> list[dict[int, float]]:
    return [
        {int(i): float(np.exp(p)) for i, p in zip(ids, logprobs, strict=True) if i != PAD_ID}
        for ids, logprobs in zip(sparse.ids, sparse.logprobs, strict=True)
    ]


def test_mixture_is_the_weighted_union():
    found = mix(
        [candidate({1: 0.5, 2: 0.5}), candidate({2: 0.5, 3: 0.5})],
        np.array([[0.25, 0.75]]),
        top_k=10,
        renormalise=True,
    )
    assert as_dicts(found.rows)[0] == pytest.approx({2: 0.5, 3: 0.375, 1: 0.125})
    assert found.rows.ids[0][:3].tolist() == [2, 3, 1]
    assert found.cut_mass[0] == 0


def test_cut_mass_is_counted_and_rescaled_or_joins_the_tail():
    parts, weights = [candidate({1: 0.5, 2: 0.3, 3: 0.1}, tail=[0.1])], np.array([[1.0]])
    scaled = mix(parts, weights, top_k=2, renormalise=True)
    bucket = mix(parts, weights, top_k=2, renormalise=False)
    assert as_dicts(scaled.rows)[0] == pytest.approx({1: 0.625, 2: 0.375})
    assert as_dicts(bucket.rows)[0] == pytest.approx({1: 0.5, 2: 0.3})
    assert scaled.cut_mass[0] == pytest.approx(0.1)
    assert bucket.cut_mass[0] == pytest.approx(0.1)
    assert scaled.tail_mass[0] == 0
    assert bucket.tail_mass[0] == pytest.approx(0.2)


def test_no_weight_means_no_distribution():
    found = mix([candidate({1: 1.0})], np.array([[0.0]]), top_k=3, renormalise=True)
    assert not found.rows.present.any()
    assert found.tail_mass.tolist() == [0]


def test_ties_at_the_border_go_to_the_smaller_id():
    found = mix([candidate({9: 0.25, 4: 0.25, 6: 0.5})], np.array([[1.0]]), top_k=2, renormalise=False)
    assert found.rows.ids.tolist() == [[6, 4]]


def test_weights_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="one column per candidate"):
        mix([candidate({1: 1.0})], np.ones((1, 2)), top_k=2, renormalise=True)


def test_own_rows_are_rescaled_or_keep_their_tail():
    own = rows({1: 0.5, 2: 0.25}, {})
    scaled, bucket = as_candidate(own, renormalise=True), as_candidate(own, renormalise=False)
    assert as_dicts(scaled.rows)[0] == pytest.approx({1: 2 / 3, 2: 1 / 3})
    assert as_dicts(bucket.rows)[0] == pytest.approx({1: 0.5, 2: 0.25})
    np.testing.assert_allclose(scaled.tail_mass, [0, 0])
    np.testing.assert_allclose(bucket.tail_mass, [0.25, 0])


def test_without_removes_positions_and_leaves_the_rest():
    found = without(candidate({1: 0.5}, {2: 0.5}, tail=[0.5, 0.5]), np.array([False, True]))
    assert found.rows.present.tolist() == [True, False]
    assert found.tail_mass.tolist() == [0.5, 0]


row = st.dictionaries(st.integers(0, 12), st.floats(0.01, 1), max_size=6).map(
    lambda entries: dict(
        sorted(((i, p / (sum(entries.values()) * 1.25)) for i, p in entries.items()), key=lambda pair: -pair[1])
    )
)


@given(
    st.lists(st.tuples(row, row, row), min_size=1, max_size=5),
    st.integers(1, 8),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(max_examples=80)
def test_mixture_agrees_with_brute_force(positions, top_k, renormalise, seed):
    present = np.array([[bool(entries) for entries in position] for position in positions])
    weights = np.random.default_rng(seed).random(present.shape) * present
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
    tails = np.where(present, 0.2, 0.0)
    parts = [candidate(*[p[c] for p in positions], tail=tails[:, c].tolist()) for c in range(3)]
    found = mix(parts, weights, top_k=top_k, renormalise=renormalise)
    for index, position in enumerate(positions):
        union: dict[int, float] = {}
        for weight, entries in zip(weights[index], position, strict=True):
            for token, prob in entries.items():
                union[token] = union.get(token, 0.0) + weight * prob
        ordered = sorted(union.values(), reverse=True)
        kept, cut = ordered[:top_k], sum(ordered[top_k:])
        scale = sum(kept) if renormalise and kept else 1.0
        entries = as_dicts(found.rows)[index]
        np.testing.assert_allclose(list(entries.values()), np.array(kept) / scale, rtol=1e-5)
        assert all(prob == pytest.approx(union[token] / scale, rel=1e-5) for token, prob in entries.items())
        assert found.cut_mass[index] == pytest.approx(cut, abs=1e-6)
        if kept:
            assert sum(entries.values()) + found.tail_mass[index] == pytest.approx(1, abs=1e-5)
