import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.align.pairing.cheapest_path import cheapest_path


def full_recursion(distances, source_index, target_index):
    """Compute every cell in plain Python: spans and cost of the cheapest path, ties diagonal first, then k-1, then j-1."""
    cost = distances.astype(int)[source_index][:, target_index].tolist()
    num_source, num_target = len(source_index), len(target_index)
    total = [[0] * num_target for _ in range(num_source)]
    for k in range(num_source):
        for j in range(num_target):
            before = [total[at][to] for at, to in predecessors(k, j)]
            total[k][j] = cost[k][j] + min(before, default=0)
    k, j = num_source - 1, num_target - 1
    path = [(k, j)]
    while k or j:
        k, j = min(predecessors(k, j), key=lambda at: total[at[0]][at[1]])
        path.append((k, j))
    start = [min(k for k, at in path if at == j) for j in range(num_target)]
    end = [max(k for k, at in path if at == j) + 1 for j in range(num_target)]
    return start, end, total[-1][-1]


def predecessors(k, j):
    return [(at, to) for at, to in ((k - 1, j - 1), (k - 1, j), (k, j - 1)) if at >= 0 and to >= 0]


def assert_same(distances, source_index, target_index, source_end, target_end):
    start, end, cost = cheapest_path(
        distances, source_index, target_index, source_end=source_end, target_end=target_end
    )
    assert (start.tolist(), end.tolist(), cost) == full_recursion(distances, source_index, target_index)


@st.composite
def grids(draw, longest):
    """Costs of every kind: ties everywhere, zeros off the diagonal, prices of rows and columns, costs of both widths."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["ties", "sparse zeros", "priced", "near the diagonal", "runs", "wide"]))
    rows, columns = (draw(st.integers(1, 8)) for _ in range(2))
    num_source, num_target = (draw(st.integers(1, longest)) for _ in range(2))
    source_index, target_index = rng.integers(0, rows, num_source), rng.integers(0, columns, num_target)
    largest = {"ties": 2, "wide": 60_000}.get(kind, 9)
    distances = rng.integers(0, largest, (rows, columns)).astype(np.uint16 if kind == "wide" else np.uint8)
    if kind == "sparse zeros":
        distances[rng.random(distances.shape) < 0.7] = 0
    elif kind == "priced":
        distances += rng.integers(0, 9, (rows, 1)).astype(np.uint8) + rng.integers(0, 9, columns).astype(np.uint8)
    elif kind == "near the diagonal":
        distances = np.where(np.eye(rows, columns, dtype=bool), 0, distances + 5).astype(np.uint8)
        target_index = np.resize(np.sort(source_index), num_target) % columns
    elif kind == "runs":
        source_index, target_index = np.sort(source_index), np.sort(target_index)
    return distances, source_index, target_index


@st.composite
def ends(draw, length):
    """How far tokens reach: evenly, all at once, late, or anyhow."""
    kind = draw(st.sampled_from(["even", "at once", "late", "any"]))
    if kind == "any":
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        return np.sort(rng.integers(0, 2 * length, length))
    return {"even": np.arange(length), "at once": np.zeros(length, int), "late": np.arange(length) // length * 9}[kind]


@settings(max_examples=200)
@given(st.data())
def test_path_and_cost_are_those_of_the_full_recursion(data):
    distances, source_index, target_index = data.draw(grids(longest=12))
    assert_same(
        distances,
        source_index,
        target_index,
        data.draw(ends(len(source_index))),
        data.draw(ends(len(target_index))),
    )


@settings(max_examples=60)
@given(st.data())
def test_path_and_cost_are_those_of_the_full_recursion_beyond_the_corridor(data):
    distances, source_index, target_index = data.draw(grids(longest=130))
    assert_same(
        distances,
        source_index,
        target_index,
        data.draw(ends(len(source_index))),
        data.draw(ends(len(target_index))),
    )


@pytest.mark.parametrize("gap", [1, 23, 24, 25, 26, 60])
def test_a_detour_far_from_the_corridor_is_found(gap):
    # The target has ``gap`` more tokens first, which one source token takes for nothing; the ends say that both texts run
    # side by side, so the corridor's path pays at every token.
    distances = np.where(np.eye(8, dtype=bool), 0, 7).astype(np.uint8)
    text = np.arange(1, 71) % 7 + 1
    source, target = np.append(0, text), np.append(np.zeros(gap + 1, int), text)
    for first, second in ((source, target), (target, source)):
        assert_same(distances, first, second, np.arange(len(first)), np.arange(len(second)))
        assert (
            cheapest_path(
                distances, first, second, source_end=np.arange(len(first)), target_end=np.arange(len(second))
            )[2]
            == 0
        )


def test_ends_in_any_order_change_nothing():
    rng = np.random.default_rng(5)
    distances = rng.integers(0, 6, (5, 5)).astype(np.uint8)
    source_index, target_index = rng.integers(0, 5, 90), rng.integers(0, 5, 110)
    assert_same(distances, source_index, target_index, rng.permutation(90), np.arange(110))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (2, 70), (70, 2)])
def test_thin_grids_are_walked_to_the_end(shape, dtype):
    rng = np.random.default_rng(3)
    distances = rng.integers(0, 200, (3, 4)).astype(dtype)
    source_index, target_index = rng.integers(0, 3, shape[0]), rng.integers(0, 4, shape[1])
    assert_same(distances, source_index, target_index, np.arange(shape[0]), np.arange(shape[1]))
