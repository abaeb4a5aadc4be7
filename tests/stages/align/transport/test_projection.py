import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.align.transport.projection import column_mass, keep_largest


def test_plan_projection_sums_columns():
    plan = np.array([[[0.1, 0.2], [0.3, 0.4]]])
    np.testing.assert_allclose(column_mass(plan, "plan"), [[0.4, 0.6]])


def test_argmax_selects_each_row_s_largest_entry_and_rescales():
    plan = np.array([[[0.3, 0.1, 0.0], [0.05, 0.25, 0.1], [0.1, 0.0, 0.1]]])
    # Largest entries: 0.3 in column 0, 0.25 in column 1, and of the two 0.1 the first, in column 0.
    np.testing.assert_allclose(column_mass(plan, "argmax"), np.array([[0.4, 0.25, 0.0]]) / 0.65)


def test_argmax_keeps_the_plan_s_mass():
    plan = np.array([[[0.2, 0.1], [0.1, 0.3]]])
    assert column_mass(plan, "argmax").sum() == pytest.approx(0.7)


def test_rows_without_mass_select_nothing():
    plan = np.zeros((2, 2, 2))
    plan[0, 0, 1] = 1.0
    assert column_mass(plan, "argmax").tolist() == [[0, 1], [0, 0]]


def test_entries_are_sorted_with_ties_by_lower_id():
    found = keep_largest(np.array([[9, 4, 7, 2]]), np.array([[0.2, 0.3, 0.2, 0.3]]), top_k=4, tail="renormalise")
    assert found.ids.tolist() == [[2, 4, 7, 9]]
    np.testing.assert_allclose(found.probs, [[0.3, 0.3, 0.2, 0.2]])


def test_cut_mass_is_made_up_by_the_rest_or_joins_the_tail():
    ids, mass = np.array([[1, 2, 3]]), np.array([[0.5, 0.2, 0.1]])
    renormalised = keep_largest(ids, mass, top_k=2, tail="renormalise")
    np.testing.assert_allclose(renormalised.probs, [[5 / 7, 2 / 7]])
    np.testing.assert_allclose(renormalised.cut_mass, [0.1])
    assert renormalised.tail_mass.tolist() == [0]
    bucket = keep_largest(ids, mass, top_k=2, tail="bucket")
    np.testing.assert_allclose(bucket.probs, [[0.5, 0.2]])
    np.testing.assert_allclose(bucket.cut_mass, [0.1])
    np.testing.assert_allclose(bucket.tail_mass, [0.3])


def test_entries_without_mass_are_left_out():
    found = keep_largest(np.array([[1, 2, -1]]), np.array([[0.0, 0.5, 0.0]]), top_k=3, tail="bucket")
    assert found.ids.tolist() == [[2, -1, -1]]
    assert found.probs.tolist() == [[0.5, 0, 0]]


def test_nothing_to_keep_is_no_distribution():
    found = keep_largest(np.full((1, 2), -1), np.zeros((1, 2)), top_k=2, tail="renormalise")
    assert found.ids.tolist() == [[-1, -1]]
    assert np.isfinite(found.probs).all()


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_the_kept_entries_equal_those_of_a_sort(m, top_k, seed):
    rng = np.random.default_rng(seed)
    ids = np.array([rng.permutation(50)[:m] for _ in range(3)])
    mass = rng.integers(0, 4, (3, m)) / (4 * m)  # many ties and zeros
    found = keep_largest(ids, mass, top_k=top_k, tail="bucket")
    for row in range(3):
        entries = sorted((-p, i) for p, i in zip(mass[row], ids[row], strict=True) if p > 0)
        kept = entries[:top_k]
        assert found.ids[row, : len(kept)].tolist() == [i for _, i in kept]
        assert (found.ids[row, len(kept) :] == -1).all()
        np.testing.assert_allclose(found.probs[row].sum() + found.tail_mass[row], 1.0)
        np.testing.assert_allclose(found.cut_mass[row], -sum(p for p, _ in entries[top_k:]), atol=1e-15)
