"""Top-k logprobs from hidden states, against the model's own logits."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from stages.contract.schemas import SHARD
from stages.logits.backends.topk import NO_GOLD, stable_topk, topk_logprobs
from stages.logits.config import LogitsConfig
from stages.logits.stage import LogitsStage
from stages.models.config import ModelConfig, load_model
from stages.models.heads import check_head, split_head
from stages.models.tokenizer import SegmentTokenizer
from tests.tiny_models import ARCHITECTURES, save_model
from tests.tiny_tokenizers import TEXTS


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def first_in_order(values: np.ndarray, k: int) -> np.ndarray:
    """Descending value, then ascending index: one row at a time, by definition."""
    return np.array([sorted(range(len(row)), key=lambda index: (-row[index], index))[:k] for row in values.tolist()])


@settings(max_examples=60)
@given(
    values=arrays.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 300)), elements=st.integers(-4, 4)),
    k=st.integers(1, 12),
)
def test_stable_topk_takes_lower_ids_first_among_equals(values, k):
    found, indices = stable_topk(torch.from_numpy(values), k)
    expected = first_in_order(values, k)
    assert np.array_equal(indices.numpy(), expected)
    assert np.array_equal(found.numpy(), np.take_along_axis(values, expected, axis=1))


@pytest.mark.parametrize("vocab_size", [511, 5_120, 5_633, 20_011])
@pytest.mark.parametrize("num_levels", [3, 200])
def test_stable_topk_is_exact_on_large_vocabularies(vocab_size, num_levels):
    generator = torch.Generator().manual_seed(vocab_size)
    values = torch.randint(num_levels, (4, vocab_size), generator=generator).float()
    values[1] = 0  # all equal
    values[2, -3:] = num_levels  # the best are the last
    _, indices = stable_topk(values, 10)
    assert np.array_equal(indices.numpy(), first_in_order(values.numpy(), 10))


def test_stable_topk_puts_nan_first_so_that_it_is_noticed():
    values = torch.zeros(1, 6_000)
    values[0, 4_321] = math.nan
    assert stable_topk(values, 10)[0].isnan().any()


@pytest.mark.parametrize("chunk_positions", [1, 3, 7, 100])
def test_chunks_give_the_same_as_the_whole(chunk_positions):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 16, generator=generator)
    weight = torch.randn(1_000, 16, generator=generator)
    gold = torch.tensor([3, 999, 0, 5, 7, 700, NO_GOLD])
    found = topk_logprobs(
        hidden, lambda states: states @ weight.T, gold, top_k=5, num_valid=1_000, chunk_positions=chunk_positions
    )
    logprobs = (hidden @ weight.T).log_softmax(-1)
    expected = logprobs.topk(5)
    assert torch.equal(found.ids, expected.indices)
    torch.testing.assert_close(found.logprobs, expected.values)
    torch.testing.assert_close(found.gold_logprob[:6], logprobs[torch.arange(6), gold[:6]])
    assert found.gold_logprob[6].isnan()


def test_no_more_than_a_chunk_of_logits_exists_at_once():
    asked = []

    def head(states):
        asked.append(len(states))
        return states.repeat(1, 10)

    topk_logprobs(torch.randn(23, 4), head, torch.zeros(23).long(), top_k=2, num_valid=40, chunk_positions=5)
    assert asked == [5, 5, 5, 5, 3]


def test_padded_rows_take_no_mass():
    logits = torch.tensor([[1.0, 2.0, 3.0, 50.0, 60.0]])  # ids 3 and 4 belong to no token
    found = topk_logprobs(
        logits, lambda states: states.clone(), torch.tensor([0]), top_k=5, num_valid=3, chunk_positions=8
    )
    expected = logits[:, :3].log_softmax(-1)
    assert found.ids.tolist() == [[2, 1, 0]]
    torch.testing.assert_close(found.logprobs, expected.flip(1))
    torch.testing.assert_close(found.gold_logprob, expected[:, 0])


def test_half_precision_logits_are_normalised_in_float32():
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(1)).mul(4).bfloat16()
    found = topk_logprobs(
        logits, lambda states: states, torch.tensor([1, 2, 3]), top_k=10, num_valid=500, chunk_positions=2
    )
    reference = logits.double().log_softmax(-1)
    assert found.logprobs.dtype == torch.float32
    torch.testing.assert_close(found.logprobs.double(), reference.gather(1, found.ids), atol=2e-6, rtol=0)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_large_logits_do_not_overflow(offset):
    logits = torch.tensor([[0.0, 1.0, -200.0]]) + offset
    found = topk_logprobs(logits, torch.clone, torch.tensor([2]), top_k=3, num_valid=3, chunk_positions=1)
    torch.testing.assert_close(found.logprobs[0], torch.tensor([1.0, 0.0, -200.0]).log_softmax(0), atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("architecture", "cap"), [*((name, None) for name in ARCHITECTURES), ("gemma3", 2.0)])
def test_body_head_and_topk_agree_with_the_models_own_logits(tmp_path, architecture, cap, dtype):
    folder = save_model(
        tmp_path,
        architecture=architecture,
        tokenizer_family="byte-bpe",
        vocab_padding=13,
        final_logit_softcapping=cap,
    )
    model = load_model(ModelConfig(name="m", path=folder), dtype=dtype, attention=("sdpa", "eager"), device="cpu")
    check_head(model)
    ids = torch.randint(300, (1, 40), generator=torch.Generator().manual_seed(2))
    num_valid = model.get_input_embeddings().num_embeddings - 13
    with torch.inference_mode():
        body, head = split_head(model)
        gold = torch.cat([ids[0, 1:], torch.tensor([NO_GOLD])])
        found = topk_logprobs(body(ids)[0], head, gold, top_k=10, num_valid=num_valid, chunk_positions=16)
        logits = model(ids).logits[0].float()
    if cap is not None:
        assert logits.abs().max() <= cap
    assert (logits[:, num_valid:].amax(1) >= logits[:, :num_valid].amax(1)).any()  # the padded rows would have won
    oracle = logits[:, :num_valid].log_softmax(-1)
    expected = oracle.topk(10)
    # A chunk of positions may be multiplied in another order than all of them: one step of the type at most.
    step = {"float32": 2e-5, "bfloat16": 2**-8, "float16": 2**-11}[dtype] * max(1.0, float(logits.abs().max()))
    torch.testing.assert_close(found.logprobs, expected.values, atol=step, rtol=1e-5)
    torch.testing.assert_close(oracle.gather(1, found.ids), found.logprobs, atol=step, rtol=1e-5)
    torch.testing.assert_close(found.gold_logprob[:-1], oracle[torch.arange(39), gold[:-1]], atol=step, rtol=1e-5)
    if dtype == "float32":
        assert torch.equal(found.ids, expected.indices)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "mpt", "gemma3", "qwen2"])
def test_bits_per_byte_are_those_of_the_models_own_loss(tmp_path, architecture):
    folder = save_model(tmp_path, architecture=architecture, tokenizer_family="byte-bpe")
    config = ModelConfig(name="m", path=folder)
    model = load_model(config, dtype="float32", attention=("eager",), device="cpu")
    tokenizer = SegmentTokenizer.load(config)
    stage = LogitsStage(LogitsConfig(dtype="float32", device="cpu", max_length=128, batch_tokens=256), config)
    stage.setup()
    rows = [
        {"doc_id": index, "segment": 0, "split": "train", "byte_start": 0, "is_last": False, "text": text}
        for index, text in enumerate(TEXTS)
    ]
    health = stage.run({"shard": pa.Table.from_pylist(rows, schema=SHARD)}).health
    nats, num_bytes = 0.0, 0
    for text in TEXTS:
        encoding = tokenizer.encode(text, is_last=False)
        ids = torch.from_numpy(encoding.ids.astype(np.int64))[None]
        with torch.inference_mode():
            nats += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        num_bytes += len(text.encode()) - int(encoding.byte_end[0])  # nothing predicts the first token
    assert health["bits_per_byte"].value == pytest.approx(nats / math.log(2) / num_bytes, abs=1e-4)
