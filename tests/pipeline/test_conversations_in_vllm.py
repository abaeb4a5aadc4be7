"""The exported model of a run on conversations answers in vLLM as in transformers. `make test-vllm` runs it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.logits.backends.vllm import is_installed
from tests.chat_run import save_chat_inputs
from tests.stages.logits.backends.test_vllm import ENVIRONMENT, HEADS
from tests.tiny_models import save_model
from tests.tiny_run import ptafuse_process

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not is_installed(), reason="vLLM is not installed; `make test-vllm` has an environment with it"),
]

MESSAGES = [{"role": "user", "content": "Who jumps over the lazy dog?"}]
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide the exported model of a run on conversations; the target's heads are wide enough for vLLM's CPU kernels."""
    config = save_chat_inputs(tmp_path_factory.mktemp("chat"))
    save_model(config.parent / "llama", architecture="llama", seed=1, chat="gemma", settings=HEADS)
    run = tmp_path_factory.mktemp("chat-run") / "run"
    # In a process of its own: aligning loads llvmlite, whose functions vLLM's CPU build cannot look through.
    ptafuse_process("train", str(config), "--run", str(run), "--local", "--upstream")
    (folder,) = run.glob("train/*/model")
    return folder


@pytest.fixture(scope="module")
def llm(exported: Path) -> Iterator[Any]:
    from vllm import LLM

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():
            patch.setenv(name, os.environ.get(name, value))
        yield LLM(str(exported), dtype="float32", enforce_eager=True, max_model_len=160, gpu_memory_utilization=0.1)


def test_vllm_gives_the_answer_that_transformers_gives(exported: Path, llm: Any) -> None:
    from vllm import SamplingParams

    tokenizer, model = AutoTokenizer.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        expected = model.generate(**prompt, max_new_tokens=MAX_TOKENS, do_sample=False)[0].tolist()
    num_prompt = prompt["input_ids"].shape[1]
    (answer,) = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=MAX_TOKENS), use_tqdm=False)
    assert answer.prompt_token_ids == expected[:num_prompt]
    assert list(answer.outputs[0].token_ids) == expected[num_prompt:]


def test_vllm_stops_at_the_end_of_the_turn(exported: Path, llm: Any) -> None:
    """The end of a turn stops an answer because of the exported generation settings, without being asked for."""
    from vllm import SamplingParams

    end_of_turn = AutoTokenizer.from_pretrained(exported).convert_tokens_to_ids("<end_of_turn>")
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logit_bias={end_of_turn: 100.0})
    (answer,) = llm.chat(MESSAGES, sampling, use_tqdm=False)
    assert answer.outputs[0].finish_reason == "stop"
    assert list(answer.outputs[0].token_ids) == [end_of_turn]
