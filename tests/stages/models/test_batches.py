"""Batches under a token budget."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stages.models.batches import token_batches

LENGTHS = st.lists(st.integers(1, 40), max_size=60)


@given(lengths=LENGTHS, max_tokens=st.integers(1, 100))
def test_every_sequence_is_in_exactly_one_batch_within_the_budget(lengths, max_tokens):
    batches = token_batches(lengths, max_tokens=max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[index] for index in batch)
        assert padded <= max_tokens or len(batch) == 1


@given(lengths=LENGTHS, max_tokens=st.integers(1, 100))
def test_longest_come_first_and_equal_lengths_keep_their_order(lengths, max_tokens):
    order = [int(index) for batch in token_batches(lengths, max_tokens=max_tokens) for index in batch]
    assert order == sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))


def test_a_batch_is_as_large_as_the_budget_allows():
    batches = token_batches(np.array([5, 5, 5, 2, 2]), max_tokens=10)
    assert [batch.tolist() for batch in batches] == [[0, 1], [2, 3], [4]]


def test_no_sequences_give_no_batches():
    assert token_batches([], max_tokens=8) == []
