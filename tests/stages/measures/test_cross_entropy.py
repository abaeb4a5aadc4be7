"""What counts towards a model's cross-entropy."""

import math

import numpy as np
import pytest

from stages.measures.cross_entropy import cross_entropy, first_common_byte


def test_a_special_token_that_stands_for_text_counts_with_its_bytes() -> None:
    """<bos> a <unk> b <eos>, where <unk> covers ten bytes."""
    is_special = np.array([True, False, True, False, True])
    found = cross_entropy(np.array([-1.0, -2.0, -3.0, -4.0, np.nan]), np.array([0, 1, 11, 12, 12]), is_special)
    assert found.num_bytes == 12
    assert found.num_tokens == 3
    assert found.nats == 6.0


def test_special_tokens_without_bytes_are_left_out() -> None:
    found = cross_entropy(np.array([-1.0, -8.0, np.nan]), np.array([0, 3, 3]), np.array([True, False, True]))
    assert (found.nats, found.num_tokens, found.num_bytes) == (1.0, 1, 3)
    assert found.bits_per_byte == pytest.approx(1 / math.log(2) / 3)


def test_a_text_token_without_bytes_counts() -> None:
    """A dummy prefix that is a token of its own has no bytes, and the model predicts it all the same."""
    found = cross_entropy(np.array([-1.0, -2.0, np.nan]), np.array([0, 0, 3]), np.zeros(3, bool))
    assert (found.nats, found.num_tokens, found.num_bytes) == (3.0, 2, 3)


def test_tokens_that_begin_before_the_first_counted_byte_are_left_out() -> None:
    gold, byte_end = np.array([-1.0, -2.0, -3.0, np.nan]), np.array([0, 2, 5, 9])
    found = cross_entropy(gold, byte_end, np.array([True, False, False, False]), first_byte=2)
    assert (found.nats, found.num_tokens, found.num_bytes) == (5.0, 2, 7)


def test_models_are_compared_from_the_first_byte_that_all_predict_and_where_all_have_a_token() -> None:
    with_prefix, without = np.array([0, 2, 5, 9]), np.array([3, 5, 9])
    assert first_common_byte([with_prefix, with_prefix]) == 0
    assert first_common_byte([with_prefix, without]) == 5  # byte 3 is inside a token of the first
    assert first_common_byte([np.array([0, 9]), without]) == 9  # nothing is left to compare
    assert first_common_byte([]) == 0
