"""Inner and Center Distance against their definition, one position and one token at a time."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.analysis.interpret import distances
from pipeline.analysis.interpret.distances import center_distance, spread
from stages.contract.columns import PAD_ID, SparseRows
from stages.models.token_space import TokenSpace
from tests.stages.models.test_token_space import vocabulary

SIZE, WIDTH = 30, 5


def space_of(rows) -> TokenSpace:
    return TokenSpace(np.asarray(rows, np.float16), vocabulary(len(rows)))


CROSS = space_of([[1, 0], [-1, 0], [0, 1], [0, -1]])  # the centre is the origin: rows are their own directions
SPACE = space_of(np.random.default_rng(0).normal(size=(SIZE, 8)) + 3)


def sparse(*entries: dict[int, float]) -> SparseRows:
    ids = np.full((len(entries), WIDTH), PAD_ID, np.int32)
    logprobs = np.full((len(entries), WIDTH), -np.inf, np.float32)
    for row, probs in enumerate(entries):
        ids[row, : len(probs)] = list(probs)
        logprobs[row, : len(probs)] = np.log(list(probs.values()))
    return SparseRows(ids, logprobs)


def by_definition(probs: dict[int, float], space: TokenSpace) -> tuple[float, np.ndarray]:
    """Inner Distance and centre in plain Python."""
    total = sum(probs.values())
    directions = {token: space.directions(np.array([token]))[0].astype(float) for token in probs}
    centre = sum(prob / total * directions[token] for token, prob in probs.items())
    return sum(prob / total * math.dist(directions[token], centre) for token, prob in probs.items()), centre


distributions = st.dictionaries(st.integers(0, SIZE - 1), st.floats(0.01, 0.2), min_size=1, max_size=WIDTH)


def test_one_token_has_no_spread_and_unrelated_ones_all_of_it():
    rows = sparse({0: 1.0}, {2: 0.3}, {0: 0.5, 1: 0.5}, {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25}, {0: 0.5, 2: 0.5})
    inner, centre = spread(rows, CROSS)
    np.testing.assert_allclose(inner, [0, 0, 1, 1, math.sqrt(0.5)], atol=1e-6)
    np.testing.assert_allclose(centre, [[1, 0], [0, 1], [0, 0], [0, 0], [0.5, 0.5]], atol=1e-6)
    assert inner[0] == inner[1] == 0


def test_centers_of_unrelated_and_opposite_tokens():
    first, second = (
        spread(sparse({0: 1.0}, {0: 1.0}, {0: 1.0}), CROSS),
        spread(sparse({0: 0.4}, {2: 1.0}, {1: 1.0}), CROSS),
    )
    np.testing.assert_allclose(center_distance(first, second), [0, math.sqrt(2), 2], atol=1e-6)


def test_positions_without_a_distribution_have_no_distance():
    found = spread(sparse({}, {3: 0.5}), CROSS)
    assert np.isnan(found.inner).tolist() == [True, False]
    assert np.isnan(center_distance(found, found)).tolist() == [True, False]
    nothing = spread(SparseRows(np.zeros((2, 0), np.int32), np.zeros((2, 0), np.float32)), CROSS)
    assert np.isnan(nothing.inner).all()


@given(st.lists(distributions, min_size=1, max_size=4), st.lists(distributions, min_size=4, max_size=4))
@settings(max_examples=50)
def test_figures_are_those_of_the_definition(first, second):
    found, other = spread(sparse(*first), SPACE), spread(sparse(*second[: len(first)]), SPACE)
    for row, (probs, others) in enumerate(zip(first, second, strict=False)):
        inner, centre = by_definition(probs, SPACE)
        other_centre = by_definition(others, SPACE)[1]
        assert found.inner[row] == pytest.approx(inner, abs=1e-5)
        assert center_distance(found, other)[row] == pytest.approx(math.dist(centre, other_centre), abs=1e-5)


@given(distributions, st.permutations(range(WIDTH)), st.floats(0.1, 1))
@settings(max_examples=50)
def test_order_and_tail_of_a_row_do_not_matter(probs, order, scale):
    rows = sparse(probs)
    shuffled = SparseRows(rows.ids[:, order], rows.logprobs[:, order] + np.float32(math.log(scale)))
    first, second = spread(rows, SPACE), spread(shuffled, SPACE)
    assert first.inner == pytest.approx(second.inner, abs=1e-6)
    assert center_distance(first, second) == pytest.approx(0, abs=1e-6)


@given(distributions, distributions)
@settings(max_examples=50)
def test_distances_stay_in_their_range(first, second):
    found, other = spread(sparse(first), SPACE), spread(sparse(second), SPACE)
    assert -1e-6 <= found.inner[0] <= 1 + 1e-6
    assert (found.inner[0] == 0) or len(first) > 1
    assert 0 <= center_distance(found, other)[0] <= 2 + 1e-6
    assert center_distance(found, found)[0] == 0
    # Jensen: the mean distance is at most the root of the mean squared one, which is 1 - ||centre||^2.
    assert found.inner[0] ** 2 <= 1 - float((found.centre**2).sum()) + 1e-5


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    rows = sparse(*({int(token): 0.1 for token in rng.choice(SIZE, 4, replace=False)} for _ in range(17)))
    whole = spread(rows, SPACE)
    monkeypatch.setattr(distances, "BLOCK_VALUES", 3 * WIDTH * SPACE.num_dimensions)
    np.testing.assert_allclose(spread(rows, SPACE).inner, whole.inner, atol=1e-6)
