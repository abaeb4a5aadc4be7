from dataclasses import replace

import numpy as np
import pytest

from stages.models.token_space import TokenSpace
from stages.models.vocabulary import Vocabulary


def vocabulary(num_ordinary: int, num_special: int = 0) -> Vocabulary:
    size = num_ordinary + num_special
    return Vocabulary(
        token_bytes=tuple(f"t{index}".encode() for index in range(size)),
        is_marked=np.zeros(size, bool),
        is_special=np.arange(size) >= num_ordinary,
        bos_id=None,
        eos_id=None,
    )


def test_directions_are_centred_on_ordinary_tokens_and_of_unit_length():
    rows = np.array([[1, 0], [3, 0], [2, 5], [2, -5], [900, 900]], np.float16)
    space = TokenSpace(rows, vocabulary(4, num_special=1))
    assert space.mean.tolist() == [2, 0]
    assert space.directions(np.array([0, 1, 2, 3])).tolist() == [[-1, 0], [1, 0], [0, 1], [0, -1]]
    assert np.linalg.norm(space.directions(np.array([4]))) == pytest.approx(1)


def test_a_token_at_the_centre_has_no_direction():
    space = TokenSpace(np.array([[1, 1], [-1, -1], [0, 0]], np.float16), vocabulary(3))
    assert space.directions(np.array([2])).tolist() == [[0, 0]]


def test_padded_rows_are_left_out_and_missing_ones_refused():
    rows = np.array([[1, 0], [-1, 0], [50, 50]], np.float16)
    assert TokenSpace(rows, vocabulary(2)).mean.tolist() == [0, 0]
    with pytest.raises(ValueError, match="3 embedding rows for 4 tokens"):
        TokenSpace(rows, vocabulary(4))


def test_tokens_that_stand_for_nothing_need_no_row():
    without = vocabulary(2, num_special=2)
    without = replace(without, token_bytes=(*without.token_bytes[:2], b"", b""))
    space = TokenSpace(np.array([[1, 0], [-1, 0]], np.float16), without)
    assert space.rows.tolist() == [[1, 0], [-1, 0], [0, 0], [0, 0]]
    assert space.mean.tolist() == [0, 0]
