"""What vLLM's engine is told; needs no vLLM."""

from pathlib import Path

import numpy as np
import pytest

from stages.logits.backends.vllm import ValidIds, VllmBackend, engine_arguments
from stages.logits.config import LogitsConfig
from stages.models.config import ModelConfig

LOCAL = ModelConfig(name="m", path=Path("/models/m"))
REMOTE = ModelConfig(name="m", hub="someone/m", revision="abc")


def arguments(model: ModelConfig, **changes):
    return engine_arguments(LogitsConfig(**changes), model, max_length=2048, batch_tokens=100, width=10)


@pytest.mark.parametrize("model", [LOCAL, REMOTE])
def test_vllm_reads_only_safetensors_and_no_code(model):
    found = arguments(model)
    assert found["load_format"] == "safetensors"
    assert found["trust_remote_code"] is False
    assert arguments(model.model_copy(update={"trust_remote_code": True}))["trust_remote_code"] is True


def test_model_is_named_by_its_place():
    assert arguments(LOCAL)["model"] == "/models/m"
    assert "revision" not in arguments(LOCAL)
    assert (arguments(REMOTE)["model"], arguments(REMOTE)["revision"]) == ("someone/m", "abc")


def test_full_window_and_a_generated_token_fit():
    found = arguments(LOCAL, dtype="float32", gpu_memory_utilization=0.5)
    assert (found["max_model_len"], found["max_num_batched_tokens"], found["max_num_seqs"]) == (2049, 100, 100)
    assert (found["dtype"], found["gpu_memory_utilization"]) == ("float32", 0.5)
    assert found["max_logprobs"] == 10
    assert found["logprobs_mode"] == "raw_logprobs"
    assert not found["enable_prefix_caching"]
    module, _, name = found["worker_extension_cls"].rpartition(".")
    assert (module, name) == (ValidIds.__module__, ValidIds.__name__)


def test_several_gpus_are_those_of_this_process():
    assert arguments(LOCAL)["distributed_executor_backend"] == "uni"
    assert arguments(LOCAL, tensor_parallel_size=2)["distributed_executor_backend"] == "mp"


def test_draws_are_refused_by_a_backend_without_full_distributions():
    backend = VllmBackend.__new__(VllmBackend)  # no engine is started
    backend._model = LOCAL
    with pytest.raises(ValueError, match=r"model m: 2 draws .* vLLM returns only the largest entries"):
        backend.predict([np.zeros(3, np.int32)], [[]], np.zeros((3, 2)))
