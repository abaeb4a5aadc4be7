"""The transformers backend: what it does when memory runs out, and what it refuses."""

import numpy as np
import pytest
import torch

from stages.logits.backends.base import NotFiniteError, Predictions
from stages.logits.backends.transformers import TransformersBackend
from stages.logits.config import LogitsConfig
from stages.models.config import ModelConfig
from stages.models.windows import context_windows
from tests.tiny_models import save_model

NUM_VALID = 300


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), architecture="llama", tokenizer_family="spm-bpe")


def load(folder, **settings):
    config = LogitsConfig(**{"top_k": 7, "max_length": 64, "dtype": "float32", "device": "cpu", **settings})
    return TransformersBackend(config, ModelConfig(name="tiny", path=folder), num_valid=NUM_VALID)


def sequences(*lengths):
    generator = np.random.default_rng(0)
    return [generator.integers(0, NUM_VALID, length).astype(np.int32) for length in lengths]


def predict(backend, ids):
    return backend.predict(ids, [context_windows(len(part), max_length=backend.max_length) for part in ids])


def test_out_of_memory_halves_the_budget(llama):
    ids = sequences(60, 130, 1, 17, 64, 90, 33, 8)
    expected = predict(load(llama), ids)
    backend = load(llama)
    body, sizes = backend._body, []

    def small_machine(input_ids, **arguments):
        sizes.append(input_ids.numel())
        if input_ids.numel() > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return body(input_ids, **arguments)

    backend._body = small_machine
    found = predict(backend, ids)
    assert found.oom_retries == sum(size > 100 for size in sizes) > 0
    assert np.array_equal(found.topk_ids, expected.topk_ids)
    np.testing.assert_allclose(found.topk_logprobs, expected.topk_logprobs, atol=3e-5)
    np.testing.assert_allclose(found.gold_logprob, expected.gold_logprob, atol=3e-5)
    assert predict(backend, ids).oom_retries == 0  # what was learnt stays


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("shapes do not fit")])
def test_an_error_that_halving_does_not_help_is_raised(llama, error):
    backend = load(llama)

    def body(*_, **__):
        raise error

    backend._body = body
    with pytest.raises(type(error), match=str(error)):
        predict(backend, sequences(5, 9, 3))


def test_no_sequences_give_no_positions(llama):
    found = predict(load(llama), [])
    assert found.topk_ids.shape == (0, 7)
    assert found.starts.tolist() == [0]


def test_the_first_position_that_is_not_finite_is_named():
    predictions = Predictions.empty([3, 4], width=2)
    ids, logprobs = np.zeros((3, 2), np.int32), np.full((3, 2), -1.0, np.float32)
    gold = np.array([-1.0, -1.0, np.nan], np.float32)
    predictions.put(np.array([4, 5, 6]), ids, logprobs, gold)  # the last position of a sequence has no gold token
    with pytest.raises(NotFiniteError, match="position 2 of sequence 1") as caught:
        predictions.put(np.array([3, 4, 5]), ids, logprobs, gold)
    assert (caught.value.sequence, caught.value.position) == (1, 2)
    logprobs[1:, 1] = -np.inf
    with pytest.raises(NotFiniteError, match="position 1 of sequence 0"):
        predictions.put(np.array([6, 2, 1]), ids, logprobs, gold[:1].repeat(3))


def test_a_head_that_is_laid_out_in_an_unknown_way_is_refused(llama, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def scaled(self, input_ids=None, **arguments):
        output = forward(self, input_ids=input_ids, **arguments)
        if input_ids is not None:  # something that the head alone cannot know
            output.logits = output.logits * 1.5
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        load(llama)
