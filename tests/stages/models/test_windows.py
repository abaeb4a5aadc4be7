"""Windows over sequences longer than a model sees at once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.models.windows import context_windows


@given(length=st.integers(1, 400), max_length=st.integers(4, 60), num_prefix=st.integers(0, 1))
def test_every_position_is_taken_once_with_half_a_window_of_context(length, max_length, num_prefix):
    ids = np.arange(length)
    taken = []
    for window in context_windows(length, max_length=max_length, num_prefix=num_prefix):
        tokens = window.tokens(ids)
        assert len(tokens) == len(window) <= max_length
        seen = tokens[window.taken]  # ids are positions here
        taken += seen.tolist()
        for position in seen:
            context = position - window.start + 1
            assert context == position + 1 or context >= max_length / 2
    assert taken == list(range(length))


@given(length=st.integers(1, 400), max_length=st.integers(4, 60))
def test_every_window_begins_with_bos(length, max_length):
    ids = np.arange(length)
    for window in context_windows(length, max_length=max_length, num_prefix=1):
        tokens = window.tokens(ids)
        assert tokens[0] == 0
        assert np.array_equal(tokens[1:], np.arange(tokens[1], tokens[1] + len(tokens) - 1) if len(tokens) > 1 else [])


@pytest.mark.parametrize("length", [1, 7, 8])
def test_a_sequence_that_fits_is_one_window(length):
    (window,) = context_windows(length, max_length=8, num_prefix=1)
    assert (window.start, window.end, window.take_start, window.num_repeated) == (0, length, 0, 0)


def test_further_windows_are_half_a_window_on():
    spans = [(window.start, window.end, window.take_start) for window in context_windows(20, max_length=8)]
    assert spans == [(0, 8, 0), (4, 12, 8), (8, 16, 12), (12, 20, 16)]
