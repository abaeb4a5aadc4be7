"""What counts towards a model's cross-entropy."""

import math

import numpy as np
import pytest

from stages.measures.cross_entropy import cross_entropy, first_common_byte, learnt_cross_entropy


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


def test_of_a_conversation_learnt_tokens_count_and_the_end_of_a_turn_without_its_byte():
    gold = np.array([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0, np.nan])
    # A template token; a message of 5 bytes and its end, not learnt; a template token; a learnt one of 3 bytes, and its end.
    byte_end = np.array([0, 5, 6, 6, 8, 9, 10])
    is_trained = np.array([0, 0, 0, 0, 1, 1, 1], bool)
    ends_turn = np.array([0, 0, 1, 0, 0, 0, 1], bool)
    found = learnt_cross_entropy(gold, byte_end, is_trained=is_trained, ends_turn=ends_turn)
    assert (found.nats, found.num_tokens, found.num_bytes) == (8 + 16 + 32, 3, 3)
    later = learnt_cross_entropy(gold, byte_end, is_trained=is_trained, ends_turn=ends_turn, first_byte=7)
    assert (later.nats, later.num_tokens, later.num_bytes) == (16 + 32, 2, 1)
