"""Draws added to exact entries, by definition."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.contract.columns import PAD_ID, ids_column, padded_ids
from stages.contract.draws import add_draws, draws_row, has_draws, num_draws, without_draws


def as_dict(ids: np.ndarray, probs: np.ndarray) -> dict[int, float]:
    kept = ids != PAD_ID
    assert len(set(ids[kept].tolist())) == kept.sum(), "each id once"
    return dict(zip(ids[kept].tolist(), probs[kept].tolist(), strict=True))


def test_each_draw_stands_for_an_equal_part_of_the_tail():
    ids = np.array([[7, 2, 9], [1, PAD_ID, PAD_ID], [4, 5, 6]], np.int32)
    probs = np.array([[0.4, 0.2, 0.1], [0.6, 0.0, 0.0], [0.7, 0.2, 0.1]])
    draws = np.array([[3, 3, 3, 8], [0, 5, 5, 6], [PAD_ID] * 4], np.int32)
    found, mass = add_draws(ids, probs, draws)
    assert found.shape == mass.shape == (3, 7)
    assert as_dict(found[0], mass[0]) == pytest.approx({7: 0.4, 3: 0.225, 2: 0.2, 9: 0.1, 8: 0.075})
    assert found[0].tolist() == [7, 3, 2, 9, 8, PAD_ID, PAD_ID], "descending, a draw among the exact entries"
    assert as_dict(found[1], mass[1]) == pytest.approx({1: 0.6, 5: 0.2, 0: 0.1, 6: 0.1})
    assert as_dict(found[2], mass[2]) == pytest.approx({4: 0.7, 5: 0.2, 6: 0.1})


def test_draws_get_nothing_where_rounded_entries_hold_more_than_one():
    found, mass = add_draws(np.array([[1, 2]], np.int32), np.array([[0.75, 0.2502]]), np.array([[3, 4]], np.int32))
    assert found.tolist() == [[1, 2, PAD_ID, PAD_ID]]
    assert mass.tolist() == [[0.75, 0.2502, 0.0, 0.0]]


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 3), st.floats(0.0, 1.0), st.lists(st.integers(10, 14), min_size=3, max_size=3)),
        min_size=1,
        max_size=4,
    )
)
def test_rows_agree_with_counting(rows):
    ids, probs = np.full((len(rows), 3), PAD_ID, np.int32), np.zeros((len(rows), 3))
    draws = np.full((len(rows), 3), PAD_ID, np.int32)
    for row, (width, total, tokens) in enumerate(rows):
        ids[row, :width], probs[row, :width] = np.arange(width), total / max(width, 1)
        if len(set(tokens)) > 1:
            draws[row] = sorted(tokens)
    found, mass = add_draws(ids, probs, draws)
    for row in range(len(rows)):
        exact = as_dict(ids[row], probs[row])
        counts = Counter(draws[row][draws[row] != PAD_ID].tolist())
        tail = 1 - sum(exact.values())
        expected = exact | ({token: count * tail / 3 for token, count in counts.items()} if tail > 0 else {})
        assert as_dict(found[row], mass[row]) == pytest.approx(expected)
        assert (np.diff(mass[row]) <= 0).all()


def test_columns_come_back_as_they_were():
    rows = [np.array([[3, 3, 9], [PAD_ID] * 3, [0, 1, 2]], np.int32), np.full((2, 3), PAD_ID, np.int32)]
    table = pa.table({"token_ids": pa.array([[1, 2, 3], [4, 5]]), "sample_ids": ids_column(rows, pa.uint16())})
    assert table["sample_ids"].to_pylist() == [[[3, 3, 9], [], [0, 1, 2]], [[], []]]
    assert np.array_equal(draws_row(table, 0), rows[0])
    assert padded_ids(table, "sample_ids", 1).shape == (2, 0)
    assert (has_draws(table), num_draws(table)) == (True, 3)
    exact = without_draws(table)
    assert exact.schema.names == ["token_ids"]
    assert without_draws(exact) is exact
    assert (has_draws(exact), num_draws(exact), num_draws(table.slice(0, 0))) == (False, 0, 0)
