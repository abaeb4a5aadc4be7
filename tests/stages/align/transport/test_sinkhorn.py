import warnings

import numpy as np
import ot
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog

from stages.align.transport.sinkhorn import semi_relaxed, sinkhorn


def problems(count: int, n: int, m: int, *, seed: int = 0, peakedness: float = 3.0):
    """Integer costs with some zeros, descending marginals that fall over many orders of magnitude."""
    rng = np.random.default_rng(seed)
    cost = rng.integers(0, 9, (count, n, m)).astype(float)

    def marginal(size: int) -> np.ndarray:
        weights = np.exp(np.sort(rng.gumbel(size=(count, size)) * peakedness)[:, ::-1])
        return weights / weights.sum(axis=1, keepdims=True)

    return cost, marginal(n), marginal(m)


def solve(cost, a, b, *, epsilon=1 / 30, tolerance=1e-5, max_iterations=2000):
    return sinkhorn(cost, a, b, epsilon=epsilon, tolerance=tolerance, max_iterations=max_iterations)


@pytest.mark.parametrize("epsilon", [1 / 30, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(10, 10), (10, 20), (3, 7), (1, 4), (4, 1), (1, 1)])
def test_plan_equals_pot_s_sinkhorn(epsilon, shape):
    cost, a, b = problems(6, *shape, peakedness=1.5)
    found = solve(cost, a, b, epsilon=epsilon, tolerance=1e-10)
    assert found.converged.all()
    for index in range(len(cost)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = ot.sinkhorn(
                a[index], b[index], cost[index], epsilon, method="sinkhorn_log", numItermax=20_000, stopThr=1e-11
            )
        # POT creeps at small epsilon: its own violation bounds what can be asked of the agreement.
        reached = np.abs(expected.sum(axis=0) - b[index]).max()
        np.testing.assert_allclose(found.plan[index], expected, atol=1e-8 + 20 * reached)
        assert reached < 1e-4


@pytest.mark.parametrize("method", ["sinkhorn", "log_sinkhorn"])
@pytest.mark.parametrize(("epsilon", "shape"), [(0.2, (10, 10)), (0.5, (10, 20)), (1.0, (3, 7)), (1.0, (1, 4))])
def test_plans_equal_pot_s_batched_solver(epsilon, shape, method):
    cost, a, b = problems(40, *shape, seed=12, peakedness=1.0)
    found = solve(cost, a, b, epsilon=epsilon, tolerance=1e-10)
    assert found.converged.all()
    expected = ot.batch.solve_batch(cost, epsilon, a, b, max_iter=20_000, tol=1e-10, method=method).plan
    np.testing.assert_allclose(expected.sum(axis=1), b, atol=1e-7)  # POT has solved them too
    np.testing.assert_allclose(found.plan, expected, atol=1e-7)


def test_plan_approaches_the_exact_optimum_as_epsilon_falls():
    cost, a, b = problems(10, 8, 9, seed=1, peakedness=1.0)
    exact = np.array([(ot.emd(a[i], b[i], cost[i]) * cost[i]).sum() for i in range(len(cost))])
    gaps = []
    for epsilon in (1.0, 0.1, 0.01):
        found = solve(cost, a, b, epsilon=epsilon, tolerance=1e-9, max_iterations=5000)
        assert found.converged.all()
        gaps.append(np.abs((found.plan * cost).sum(axis=(1, 2)) - exact).max())
    assert gaps[0] > gaps[1] >= gaps[2] - 1e-9
    assert gaps[2] < 1e-6


def test_uniform_marginals_find_the_assignment():
    rng = np.random.default_rng(3)
    cost = rng.permutation(100).reshape(1, 10, 10) / 10.0  # distinct costs: one best assignment
    uniform = np.full((1, 10), 0.1)
    plan = solve(cost, uniform, uniform, epsilon=0.005, tolerance=1e-9).plan[0]
    rows, columns = linear_sum_assignment(cost[0])
    np.testing.assert_allclose((plan * cost[0]).sum(), 0.1 * cost[0][rows, columns].sum(), atol=1e-3)


def test_ten_by_ten_at_the_paper_s_epsilon_converges():
    found = solve(*problems(500, 10, 10, seed=4))
    assert found.converged.all()
    assert found.marginal_error.max() <= 1e-5
    assert found.iterations.max() < 200


def test_plan_marginals_match_inputs():
    cost, a, b = problems(50, 10, 12, seed=5)
    found = solve(cost, a, b)
    np.testing.assert_allclose(found.plan.sum(axis=2), a, atol=1e-5)
    np.testing.assert_allclose(found.plan.sum(axis=1), b, atol=1e-5)
    errors = np.maximum(np.abs(found.plan.sum(axis=2) - a).max(axis=1), np.abs(found.plan.sum(axis=1) - b).max(axis=1))
    np.testing.assert_allclose(found.marginal_error, errors, atol=1e-15)


def test_batch_equals_loop():
    cost, a, b = problems(20, 6, 7, seed=6)
    batch = solve(cost, a, b)
    for index in range(len(cost)):
        one = slice(index, index + 1)
        assert (solve(cost[one], a[one], b[one]).plan[0] == batch.plan[index]).all()
    relaxed = semi_relaxed(cost, a, b, epsilon=0.5)
    for index in range(len(cost)):
        one = slice(index, index + 1)
        assert (semi_relaxed(cost[one], a[one], b[one], epsilon=0.5)[0] == relaxed[index]).all()


def test_zero_marginals_give_zero_rows_and_columns():
    cost, a, b = problems(5, 6, 6, seed=7)
    a[:, 2] = b[:, 4] = b[:, 5] = 0
    a /= a.sum(axis=1, keepdims=True)
    b /= b.sum(axis=1, keepdims=True)
    found = solve(cost, a, b)
    assert np.isfinite(found.plan).all()
    assert found.converged.all()
    assert (found.plan[:, 2] == 0).all()
    assert (found.plan[:, :, 4:] == 0).all()
    keep_rows, keep_columns = [0, 1, 3, 4, 5], [0, 1, 2, 3]
    small = solve(cost[:, keep_rows][:, :, keep_columns], a[:, keep_rows], b[:, keep_columns])
    np.testing.assert_allclose(found.plan[:, keep_rows][:, :, keep_columns], small.plan, atol=1e-12)


def test_a_problem_without_mass_is_solved_by_nothing():
    found = solve(np.ones((2, 3, 3)), np.array([[0, 0, 0], [1.0, 0, 0]]), np.array([[0, 0, 0], [0, 0.5, 0.5]]))
    assert found.converged.all()
    assert (found.plan[0] == 0).all()
    assert found.plan[1].tolist() == [[0, 0.5, 0.5], [0, 0, 0], [0, 0, 0]]


def test_no_problems_give_no_plans():
    empty = np.zeros((0, 4))
    assert solve(np.zeros((0, 4, 4)), empty, empty).plan.shape == (0, 4, 4)
    assert semi_relaxed(np.zeros((0, 4, 4)), empty, empty, epsilon=1.0).shape == (0, 4, 4)


@pytest.mark.parametrize("distance", [30.0, 1000.0])
def test_costs_that_underflow_still_move_the_mass(distance):
    cost = np.full((1, 3, 3), distance)
    np.fill_diagonal(cost[0], 0)
    a, b = np.array([[0.6, 0.3, 0.1]]), np.array([[0.1, 0.3, 0.6]])
    found = solve(cost, a, b, tolerance=1e-9)
    assert found.converged.all()
    # 0.5 goes from the first to the last, at equal cost directly or through the middle; the rest stays.
    np.testing.assert_allclose((found.plan[0] * cost[0]).sum(), 0.5 * distance, rtol=0.2)
    np.testing.assert_allclose(found.plan[0].sum(axis=0), b[0], atol=1e-9)


def test_marginals_of_any_equal_sum_scale_the_plan():
    cost, a, b = problems(4, 5, 5, seed=8, peakedness=1.0)
    np.testing.assert_allclose(
        solve(cost, 0.25 * a, 0.25 * b, tolerance=1e-11).plan, 0.25 * solve(cost, a, b, tolerance=1e-11).plan, atol=1e-9
    )


def test_the_iteration_limit_is_kept_and_reported():
    cost, a, b = problems(20, 10, 10, seed=9)
    found = solve(cost, a, b, max_iterations=2, tolerance=1e-12)
    assert (found.iterations <= 2).all()
    assert not found.converged.all()
    assert np.isfinite(found.plan).all()
    assert (found.marginal_error[~found.converged] > 1e-12).all()


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1), st.sampled_from([1 / 30, 0.2, 2.0]))
def test_plans_are_non_negative_and_conserve_mass(n, m, seed, epsilon):
    rng = np.random.default_rng(seed)
    cost, a, b = problems(3, n, m, seed=seed, peakedness=float(rng.uniform(0, 6)))
    a[:, rng.random(n) < 0.3] = 0
    a[:, 0] += 1e-3
    a /= a.sum(axis=1, keepdims=True)
    balanced = solve(cost, a, b, epsilon=epsilon).plan
    relaxed = semi_relaxed(cost, a, b, epsilon=epsilon)
    for plan in (balanced, relaxed):
        assert (plan >= 0).all()
        np.testing.assert_allclose(plan.sum(axis=2), a, atol=1e-5)
    np.testing.assert_allclose(balanced.sum(axis=1), b, atol=1e-5)


def test_semi_relaxed_equals_its_formula():
    cost, a, b = problems(10, 10, 20, seed=10)
    b[:, 3] = 0
    weights = b[:, None, :] * np.exp(-cost / 0.5)
    expected = a[:, :, None] * weights / weights.sum(axis=2, keepdims=True)
    np.testing.assert_allclose(semi_relaxed(cost, a, b, epsilon=0.5), expected, rtol=1e-12)


def test_semi_relaxed_solves_its_linear_program_as_epsilon_falls():
    cost, a, b = problems(1, 4, 5, seed=11)
    plan = semi_relaxed(cost, a, b, epsilon=1e-4)[0]
    rows = np.kron(np.eye(4), np.ones(5))  # each source row's mass is fixed, nothing else is
    best = linprog(cost[0].ravel(), A_eq=rows, b_eq=a[0], bounds=(0, None))
    np.testing.assert_allclose((plan * cost[0]).sum(), best.fun, atol=1e-9)


def test_semi_relaxed_does_not_underflow():
    plan = semi_relaxed(np.array([[[1000.0, 1001.0]]]), np.array([[1.0]]), np.array([[0.5, 0.5]]), epsilon=1 / 30)
    np.testing.assert_allclose(plan[0, 0], [1.0, 0.0], atol=1e-12)


def test_semi_relaxed_gives_padding_nothing():
    plan = semi_relaxed(np.zeros((2, 2, 2)), np.array([[1.0, 0], [0, 0]]), np.array([[0, 1.0], [0, 0]]), epsilon=1.0)
    assert plan.tolist() == [[[0, 1], [0, 0]], [[0, 0], [0, 0]]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cost": np.zeros((2, 3))}, "expected cost"),
        ({"a": np.ones((2, 4)) / 4}, "expected cost"),
        ({"cost": np.full((2, 3, 3), np.nan)}, "problem 0 of 2: a cost"),
        ({"cost": np.stack([np.zeros((3, 3)), -np.ones((3, 3))])}, "problem 1 of 2: a cost"),
        ({"b": np.array([[1.0, 0, 0], [2.0, -1.0, 0]])}, "problem 1 of 2: b"),
        ({"a": np.array([[np.inf, 0, 0], [1.0, 0, 0]])}, "problem 0 of 2: a"),
    ],
)
def test_what_does_not_fit_is_refused_by_number(change, message):
    arguments = {"cost": np.zeros((2, 3, 3)), "a": np.full((2, 3), 1 / 3), "b": np.full((2, 3), 1 / 3), **change}
    with pytest.raises(ValueError, match=message):
        solve(**arguments)
    with pytest.raises(ValueError, match=message):
        semi_relaxed(**arguments, epsilon=1.0)


def test_marginals_of_different_sums_are_refused():
    with pytest.raises(ValueError, match="problem 1 of 2: the marginals' sums"):
        solve(np.zeros((2, 1, 1)), np.array([[1.0], [1.0]]), np.array([[1.0], [0.9]]))


def test_mass_without_any_prior_is_refused():
    with pytest.raises(ValueError, match="problem 0 of 1: the source has mass"):
        semi_relaxed(np.zeros((1, 1, 1)), np.array([[1.0]]), np.array([[0.0]]), epsilon=1.0)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan")])
def test_an_epsilon_that_is_not_positive_is_refused(epsilon):
    with pytest.raises(ValueError, match="epsilon"):
        solve(np.zeros((1, 1, 1)), np.ones((1, 1)), np.ones((1, 1)), epsilon=epsilon)
