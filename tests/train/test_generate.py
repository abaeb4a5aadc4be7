"""Answers to held-out prompts: greedy, cut at the token that ends a turn, the same whatever they are batched with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.contract.roles import Role
from stages.models.config import ModelConfig, load_model
from stages.models.segment_text import Message, SegmentText
from stages.models.tokenizer import Encoding, SegmentTokenizer
from tests.tiny_models import save_model
from train.config import EvalConfig
from train.generate import answer_prompts, prompt_of, stop_ids

CONFIG = EvalConfig(dtype="float32", device="cpu", num_generations=3, generation_tokens=12, batch_tokens=4000)
PROMPTS = [(7, "The quick brown"), (8, "In the morning the ships left the harbour, and"), (9, "He")]


@pytest.fixture(scope="module", params=[("llama", "byte-bpe"), ("gemma3", "byte-bpe"), ("mpt", "byte-bpe")])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    architecture, family = request.param
    folder = save_model(
        tmp_path_factory.mktemp("chat") / architecture,
        architecture=architecture,
        tokenizer_family=family,
        seed=5,
        vocab_padding=8,
    )
    return ModelConfig(name="tiny", path=folder)


@pytest.fixture(scope="module")
def loaded(model: ModelConfig) -> Any:
    return load_model(model, dtype="float32", attention=("eager",), device="cpu")


@pytest.fixture(scope="module")
def tokenizer(model: ModelConfig) -> SegmentTokenizer:
    return SegmentTokenizer.load(model)


def greedy(loaded: Any, ids: list[int], num_ids: int, limit: int) -> list[int]:
    """The likeliest tokens one by one, without a cache, over the ids that the tokenizer has."""
    written: list[int] = []
    for _ in range(limit):
        with torch.no_grad():
            logits = loaded(torch.tensor([[*ids, *written]])).logits[0, -1, :num_ids]
        written.append(int(logits.argmax()))
    return written


def prompts(tokenizer: SegmentTokenizer) -> list[tuple[int, np.ndarray]]:
    return [(doc_id, np.array(tokenizer.text_ids(text), np.int32)) for doc_id, text in PROMPTS]


def test_answers_are_greedy_and_end_where_the_model_says(loaded: Any, tokenizer: SegmentTokenizer) -> None:
    num_ids = tokenizer.vocabulary.size
    wanted = {doc: greedy(loaded, ids.tolist(), num_ids, 12) for doc, ids in prompts(tokenizer)}
    stop = wanted[8][4]
    before = loaded.generation_config.eos_token_id
    loaded.generation_config.eos_token_id = stop
    try:
        assert stop in stop_ids(loaded, tokenizer)
        found = answer_prompts(loaded, tokenizer, prompts(tokenizer), CONFIG)
        assert loaded.generation_config.eos_token_id == stop, "the model's own settings are left as they were"
    finally:
        loaded.generation_config.eos_token_id = before
    assert [answer.doc_id for answer in found] == [7, 8, 9]
    for answer in found:
        own = wanted[answer.doc_id]
        stops = {stop, tokenizer.vocabulary.eos_id}
        end = next((place for place, token in enumerate(own) if token in stops), None)
        assert answer.is_ended == (end is not None)
        assert answer.num_tokens == (12 if end is None else end + 1)
        content = b"".join(tokenizer.vocabulary.token_bytes[token] for token in own[:end])
        assert answer.text == content.decode(errors="replace")
    assert found[1].is_ended


def test_an_answer_does_not_depend_on_its_batch(loaded: Any, tokenizer: SegmentTokenizer) -> None:
    together = answer_prompts(loaded, tokenizer, prompts(tokenizer), CONFIG)
    alone = [answer_prompts(loaded, tokenizer, [prompt], CONFIG)[0] for prompt in prompts(tokenizer)]
    assert together == alone


def test_a_prompt_that_leaves_no_room_is_left_out(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "opt", architecture="opt", tokenizer_family="byte-bpe", seed=5, max_positions=16)
    short = ModelConfig(name="short", path=folder)
    tokenizer = SegmentTokenizer.load(short)
    loaded = load_model(short, dtype="float32", attention=("eager",), device="cpu")
    rows = [(1, np.full(16, 5, np.int32)), (2, np.full(10, 5, np.int32))]
    [answer] = answer_prompts(loaded, tokenizer, rows, CONFIG)
    assert answer.doc_id == 2
    assert answer.num_tokens <= 6


def test_the_prompt_ends_with_the_last_template_token_before_the_last_answer() -> None:
    messages = (
        Message("user", "ab", False),
        Message("assistant", "cd", True),
        Message("user", "é", False),
        Message("assistant", "fg", True),
        Message("user", "h", False),
    )
    segment = SegmentText.conversation(messages)
    text, start, end, template = Role.TEXT, Role.START, Role.EOS, Role.TEMPLATE
    rows = [  # (id, byte_end, role): ids are places, so that the prompt shows where it was cut
        (template, 0), (start, 0), (text, 2), (end, 3),
        (template, 3), (start, 3), (text, 5), (end, 6),
        (template, 6), (start, 6), (text, 8), (end, 9),
        (template, 9), (start, 9), (text, 11), (end, 12),
        (start, 12), (text, 13), (end, 14),
    ]  # fmt: skip
    roles, byte_end = (np.array(column) for column in zip(*rows, strict=True))
    encoding = Encoding(np.arange(len(rows)), byte_end, roles.astype(np.uint8), np.zeros(len(rows), bool))
    found = prompt_of(segment, encoding)
    assert found is not None
    assert found.tolist() == list(range(14))
    without_start = roles.copy()
    without_start[13] = Role.TEMPLATE  # a token straddles template and content
    assert prompt_of(segment, Encoding(encoding.ids, byte_end, without_start.astype(np.uint8), None)) is None
    assert prompt_of(SegmentText.conversation(messages[:1]), encoding) is None
    assert prompt_of(SegmentText("plain", True), Encoding(encoding.ids, byte_end)) is None
