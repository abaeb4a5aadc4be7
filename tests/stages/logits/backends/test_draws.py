"""Tokens drawn from what the top-k leave out, against the full distribution."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from stages.contract.draws import add_draws
from stages.logits.backends.topk import DRAW_BLOCK, draw, topk_logprobs

VOCAB_SIZES = (40, DRAW_BLOCK, 3 * DRAW_BLOCK, 3 * DRAW_BLOCK + 17)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stratified(rng: np.random.Generator, num_rows: int, num_draws: int) -> np.ndarray:
    return (np.arange(num_draws) + rng.random((num_rows, num_draws))) / num_draws


def drawn(mass: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    return draw(torch.from_numpy(np.asarray(mass, np.float32)), torch.from_numpy(uniforms)).numpy()


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize(("top_k", "num_draws"), [(5, 4), (16, 1), (3, 40)])
def test_expected_row_is_the_full_distribution(vocab_size, top_k, num_draws):
    rng = np.random.default_rng(vocab_size)
    num_rows = 6_000
    logits = rng.normal(size=vocab_size).astype(np.float32) * 1.5
    for border in range(DRAW_BLOCK, vocab_size, DRAW_BLOCK):  # much of the rest lies at the borders of the blocks
        logits[border - 1 : border + 1] += 3
    logits[-1] += 2
    hidden = torch.from_numpy(np.tile(logits, (num_rows, 1)))
    uniforms = torch.from_numpy(stratified(rng, num_rows, num_draws))
    found = topk_logprobs(
        hidden,
        torch.clone,
        torch.zeros(num_rows, dtype=torch.int64),
        top_k=top_k,
        num_valid=vocab_size,
        chunk_positions=999,
        uniforms=uniforms,
    )
    expected = np.exp(logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum()))
    ids, probs = add_draws(
        found.ids.numpy().astype(np.int32), np.exp(found.logprobs.numpy().astype(np.float64)), found.sample_ids.numpy()
    )
    mean = np.bincount(ids[ids >= 0], probs[ids >= 0], minlength=vocab_size) / num_rows
    in_window = np.isin(np.arange(vocab_size), found.ids[0].numpy())
    np.testing.assert_allclose(mean[in_window], expected[in_window], rtol=1e-5)
    # A token's count has at most the variance of independent draws, m p (1 - p) with p its share of the tail.
    tail = expected[~in_window].sum()
    share = expected[~in_window] / tail
    error = tail * np.sqrt(share * (1 - share) / (num_draws * num_rows))
    z = (mean[~in_window] - expected[~in_window]) / error
    assert np.abs(z).max() < 5
    assert (z**2).mean() < 1.4
    assert not np.isin(found.sample_ids.numpy(), found.ids[0].numpy()).any()
    assert (np.diff(found.sample_ids.numpy(), axis=1) >= 0).all()


def test_draws_are_the_inverse_of_the_cumulated_mass_across_block_borders():
    mass = np.zeros((1, 2 * DRAW_BLOCK + 3))
    last, first, end = DRAW_BLOCK - 1, DRAW_BLOCK, 2 * DRAW_BLOCK + 2
    mass[0, [last, first, end]] = 0.25, 0.25, 0.5
    uniforms = np.array([[0.0, 0.2499999, 0.25, 0.4999999, 0.5, 0.9999999, np.nextafter(1.0, 0.0), 1.0]])
    assert drawn(mass, uniforms)[0].tolist() == [last, last, first, first, end, end, end, end]


@settings(max_examples=150)
@given(
    mass=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 2 * DRAW_BLOCK + 5)),
        elements=st.sampled_from([0.0, 0.0, 0.0, 1.0, 2.0**-20, 2.0**-60, 2.0**-140]),
    ),
    uniforms=st.lists(st.sampled_from([0.0, 1e-300, 0.3, 0.5, 1 - 2.0**-53, 1.0]), min_size=1, max_size=4).map(sorted),
)
def test_a_token_without_probability_is_never_drawn(mass, uniforms):
    found = drawn(mass, np.tile(np.array(uniforms), (len(mass), 1)))
    assert (np.diff(found, axis=1) >= 0).all()
    for row, ids in zip(mass, found, strict=True):
        if (row > 0).any():
            assert ((ids >= 0) & (ids < len(row))).all()
            assert (row[ids] > 0).all()
        else:
            assert (ids == -1).all(), "nothing is left to draw"


@pytest.mark.parametrize("vocab_size", [*VOCAB_SIZES, 20_011])
def test_draws_agree_with_one_cumulated_sum(vocab_size):
    rng = np.random.default_rng(1)
    mass = rng.gamma(0.1, size=(50, vocab_size)).astype(np.float32)
    uniforms = stratified(rng, 50, 8)
    found = drawn(mass, uniforms)
    for row, ids, shares in zip(mass, found, uniforms, strict=True):
        ends = np.append(0.0, row.astype(np.float64).cumsum())
        ends /= ends[-1]
        # Sums of blocks are in float32: a draw that close to a border may fall on its other side.
        assert (ends[ids] - 1e-6 <= shares).all()
        assert (shares <= ends[ids + 1] + 1e-6).all()


@pytest.mark.parametrize("chunk_positions", [1, 3, 100])
def test_padded_rows_of_the_head_are_never_drawn_and_chunks_change_nothing(chunk_positions):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 900, generator=generator)
    logits[:, 700:] += 20  # rows of the embedding that no token has
    uniforms = torch.from_numpy(stratified(np.random.default_rng(0), 7, 16))

    def run(positions: int) -> torch.Tensor:
        gold = torch.zeros(7, dtype=torch.int64)
        return topk_logprobs(
            logits, torch.clone, gold, top_k=3, num_valid=700, chunk_positions=positions, uniforms=uniforms
        )

    found, whole = run(chunk_positions), run(7)
    assert torch.equal(found.sample_ids, whole.sample_ids)
    assert found.sample_ids.shape == (7, 16)
    assert int(found.sample_ids.max()) < 700
    assert not (found.sample_ids[:, :, None] == found.ids[:, None, :]).any()


def test_nothing_is_drawn_where_the_window_is_the_whole_vocabulary():
    found = topk_logprobs(
        torch.randn(2, 5),
        torch.clone,
        torch.zeros(2, dtype=torch.int64),
        top_k=8,
        num_valid=5,
        chunk_positions=2,
        uniforms=torch.full((2, 3), 0.5, dtype=torch.float64),
    )
    assert found.sample_ids.tolist() == [[-1] * 3] * 2
