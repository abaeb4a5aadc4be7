import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.align.rows import narrow


def test_top_k_without_top_p_takes_the_first_entries():
    ids, probs = narrow(np.array([[7, 3, 5]], np.int32), np.array([[0.5, 0.3, 0.1]]), top_k=2, top_p=None)
    assert ids.tolist() == [[7, 3]]
    assert probs.tolist() == [[0.5, 0.3]]


@pytest.mark.parametrize(("top_p", "kept"), [(0.1, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3), (1.0, 3)])
def test_top_p_takes_the_smallest_prefix_that_holds_it(top_p, kept):
    ids, probs = narrow(np.array([[7, 3, 5]], np.int32), np.array([[0.5, 0.25, 0.125]]), top_k=5, top_p=top_p)
    assert ids.tolist() == [[7, 3, 5][:kept] + [-1] * (3 - kept)]
    assert probs.tolist() == [[0.5, 0.25, 0.125][:kept] + [0.0] * (3 - kept)]
    assert ids.dtype == np.int32


def test_no_rows_and_rows_of_pads_stay():
    ids, probs = narrow(np.zeros((0, 3), np.int32), np.zeros((0, 3)), top_k=2, top_p=0.5)
    assert ids.shape == probs.shape == (0, 2)
    ids, _ = narrow(np.full((1, 2), -1, np.int32), np.zeros((1, 2)), top_k=2, top_p=0.5)
    assert ids.tolist() == [[-1, -1]]


@settings(max_examples=60)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.floats(0.01, 1), st.integers(1, 12))
def test_the_prefix_holds_p_and_no_shorter_one_does(weights, top_p, top_k):
    probs = np.sort(np.array(weights, float))[::-1] / (sum(weights) * 1.25)
    ids, kept = narrow(np.arange(len(probs), dtype=np.int32)[None], probs[None], top_k=top_k, top_p=top_p)
    size = int((ids[0] >= 0).sum())
    window = min(top_k, len(probs))
    assert 1 <= size <= window
    assert size == window or kept.sum() >= top_p - 1e-12
    assert size == 1 or kept[0, : size - 1].sum() < top_p + 1e-12
