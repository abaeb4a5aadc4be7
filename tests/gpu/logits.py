"""The logits stage: what the head, the top-k, the batches and the file add to the model's body; and memory that runs out."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from stages.contract.schemas import SHARD
from stages.contract.store import Store
from stages.logits.backends.topk import topk_logprobs
from stages.logits.backends.transformers import TransformersBackend
from stages.logits.config import LogitsConfig
from stages.logits.stage import LogitsStage
from stages.models.batches import NO_GOLD, PaddedBatch, padded_batch, token_batches
from stages.models.config import ModelConfig
from stages.models.devices import attention_choices
from stages.models.heads import split_head
from stages.models.tokenizer import SegmentTokenizer
from stages.models.windows import context_windows
from tests.gpu.exactness import (
    TOP_K,
    Rows,
    backend_of,
    predict,
    random_sequences,
    same_share,
)
from tests.gpu.models import llama_config, median_seconds, model_config, random_model, timed
from tests.gpu.report import Report, Setup, free_memory
from tests.gpu.sizes import Size
from tests.tiny_tokenizers import save_tokenizer
from train.model.flops import ModelFlops

OOM_HEADROOM_BYTES = 2**30
OOM_LENGTHS = (512,) * 32


@dataclass(frozen=True)
class Texts:
    """A shard of random text.

    Attributes:
        model: names the folder that holds the tokenizer alone.
        shard: a table of ``schemas.SHARD``.
        sequences: the token ids of each segment.
    """

    model: ModelConfig
    shard: pa.Table
    sequences: list[np.ndarray]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each segment."""
        return np.array([len(ids) for ids in self.sequences], np.int64)


def run_logits(report: Report, setup: Setup) -> None:
    """Time the body alone, the head alone, ``predict``, and the stage with its file, on the same segments."""
    size, device = setup.size, setup.device
    config = llama_config(size.llama)
    texts = random_texts(size, setup.scratch, vocab_size=config.vocab_size)
    num_tokens = int(texts.lengths.sum())
    report.add("segments", len(texts.sequences))
    report.add("tokens", num_tokens)
    attention = attention_choices("auto", torch.device(device), half_precision=True)[0]
    report.add("attention", attention)
    model = random_model(config, device=device, dtype=torch.bfloat16, attention=attention)
    report.add("parameters", sum(parameter.numel() for parameter in model.parameters()))
    settings = LogitsConfig(
        top_k=TOP_K, dtype="bfloat16", device=device, backend="transformers", batch_tokens=size.batch_tokens
    )
    vocab_size = SegmentTokenizer.load(texts.model).vocabulary.size
    backend = TransformersBackend(settings, texts.model, num_valid=vocab_size, loaded=model)

    # 1. The body alone, over the batches that `predict` makes.
    batches = _batches(texts.sequences, backend.max_length, settings.batch_tokens)
    report.add("padding_share", 1 - num_tokens / sum(batch.input_ids.size for batch in batches))
    body, head = split_head(model)
    inputs = [[torch.from_numpy(array).to(device) for array in (batch.input_ids, batch.mask)] for batch in batches]
    with torch.inference_mode():
        body(inputs[0][0], attention_mask=inputs[0][1])
        body_seconds = timed(lambda: [body(ids, attention_mask=mask) for ids, mask in inputs], device)
    report.add_speed("body_tokens_per_s", num_tokens / body_seconds)
    report.add_speed("body_tflops", body_flops(model, texts.lengths) / body_seconds / 1e12, ">= 450")

    # 2. The head and the top-k alone, by the number of positions whose logits exist at once.
    hidden = torch.randn(size.head_positions, model.config.hidden_size, device=device, dtype=torch.bfloat16)
    gold_ids = torch.full((size.head_positions,), NO_GOLD, device=device)
    body_per_position = body_seconds / num_tokens
    for chunk in size.head_chunks:
        with torch.inference_mode():
            work = partial(_top, hidden, head, gold_ids, vocab_size, chunk)
            seconds = median_seconds(work, device, size.rounds)
        share = seconds / size.head_positions / body_per_position
        report.add_speed(f"head_and_topk_of_body_chunk_{chunk}", share)

    # 3. `predict`, then the whole stage from the shard's table to the file of logits.
    predict(backend, texts.sequences[:2])
    predict_seconds = timed(lambda: predict(backend, texts.sequences), device)
    report.add_speed("predict_tokens_per_s", num_tokens / predict_seconds)
    report.add_speed("predict_speed_of_body", body_seconds / predict_seconds, ">= 0.9")
    stage = LogitsStage(settings, texts.model)
    stage.setup(backend)
    started = time.perf_counter()
    output = stage.run({"shard": texts.shard})
    data = Store(str(setup.scratch / "logits")).write_table("logits.parquet", output.table)
    stage_seconds = time.perf_counter() - started
    report.add("stage_tokens_of_tokens", output.num_tokens / num_tokens, ">= 1")
    report.add("file_bytes_per_token", data.num_bytes / num_tokens)
    report.add_speed("stage_tokens_per_s", num_tokens / stage_seconds)
    report.add_speed("stage_speed_of_body", body_seconds / stage_seconds, ">= 0.85")


def _top(hidden: torch.Tensor, head: Any, gold_ids: torch.Tensor, vocab_size: int, chunk: int) -> object:
    return topk_logprobs(hidden, head, gold_ids, top_k=TOP_K, num_valid=vocab_size, chunk_positions=chunk)


def _batches(sequences: list[np.ndarray], max_length: int, batch_tokens: int) -> list[PaddedBatch]:
    cuts = [
        (index, window)
        for index, ids in enumerate(sequences)
        for window in context_windows(len(ids), max_length=max_length)
    ]
    starts = np.cumsum([0, *(len(ids) for ids in sequences)])
    lengths = np.array([len(window) for _, window in cuts], np.int64)
    batches = token_batches(lengths, max_tokens=batch_tokens)
    return [padded_batch([cuts[index] for index in batch], sequences, starts) for batch in batches]


def body_flops(model: Any, lengths: np.ndarray) -> float:
    """Count the operations of the body's forward pass over sequences: a third of what the MFU counts, less the head."""
    flops = ModelFlops.of(model)
    assert flops is not None
    head = 2.0 * model.get_output_embeddings().weight.numel()
    weights = (flops.per_token / 3 - head) * float(lengths.sum())
    return weights + flops.per_token_and_length / 3 * float((lengths.astype(np.float64) ** 2).sum())


def random_texts(size: Size, folder: Path, *, vocab_size: int) -> Texts:
    """Make a tokenizer, and documents of random words whose lengths are spread as MiniPile's are.

    Args:
        size: of the texts.
        folder: where the tokenizer goes.
        vocab_size: of the tokenizer, at most.
    """
    rng = np.random.default_rng(0)
    words = _words(rng, 2 * vocab_size)
    save_tokenizer("spm-bpe", folder / "tokenizer", vocab_size=vocab_size, texts=[" ".join(words)])
    model = ModelConfig(name="random", path=folder / "tokenizer")
    tokenizer = SegmentTokenizer.load(model)
    sample = words[:: len(words) // 200]
    tokens_per_word = len(tokenizer.encode(" ".join(sample), is_last=True).ids) / len(sample)
    num_words = int(size.text_tokens / tokens_per_word)
    median = np.log(size.median_document / tokens_per_word)
    segment_words = int(0.9 * size.segment_tokens / tokens_per_word)
    lengths: list[int] = []
    while sum(lengths) < num_words:
        lengths.append(min(max(1, int(rng.lognormal(median, size.document_spread))), num_words - sum(lengths)))
    segments = [
        (document, number, min(segment_words, length - start), start + segment_words >= length)
        for document, length in enumerate(lengths)
        for number, start in enumerate(range(0, length, segment_words))
    ]
    texts = [" ".join(rng.choice(words, count)) for _, _, count, _ in segments]
    shard = pa.table(
        {
            "doc_id": [document for document, _, _, _ in segments],
            "segment": [number for _, number, _, _ in segments],
            "split": ["train"] * len(segments),
            "byte_start": [0] * len(segments),
            "is_last": [is_last for _, _, _, is_last in segments],
            "text": texts,
        },
        schema=SHARD,
    )
    encodings = tokenizer.encode_batch(texts, is_last=[is_last for _, _, _, is_last in segments])
    return Texts(model, shard, [encoding.ids for encoding in encodings])


def _words(rng: np.random.Generator, count: int) -> list[str]:
    """Draw different words of two to four syllables."""
    syllables = np.array([consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"])
    found: dict[str, None] = {}
    while len(found) < count:
        for length in (2, 3, 4):
            drawn = rng.choice(syllables, (count, length))
            found.update(dict.fromkeys("".join(word) for word in drawn))
    return list(found)[:count]


def run_out_of_memory(report: Report, setup: Setup) -> None:
    """Give a budget of tokens that cannot fit; the rows must be those of one that fits."""
    config = model_config("llama", {**setup.size.exact_shapes["llama"], "num_hidden_layers": 2})
    model = random_model(config, device=setup.device, dtype=torch.float32, attention="sdpa")
    lengths = OOM_LENGTHS if setup.size.is_full else setup.size.exact_lengths
    sequences = random_sequences(lengths, config.vocab_size)
    fitting = backend_of(model, device=setup.device, dtype="float32", batch_tokens=max(lengths))
    expected = Rows.of(predict(fitting, sequences))
    budget = sum(lengths)
    backend = backend_of(
        model, device=setup.device, dtype="float32", batch_tokens=2 * budget, chunk_positions=2 * budget
    )
    limited = _little_gpu_memory() if setup.is_fast else _little_memory(backend, most_tokens=max(*lengths, budget // 3))
    free_memory(setup.device)
    with limited:
        found = predict(backend, sequences)
        again = predict(backend, sequences)
    report.add("retries", found.oom_retries, ">= 1")
    report.add("retries_afterwards", again.oom_retries, "<= 0")
    report.add("top10_same", same_share(Rows.of(found), expected), ">= 0.9999")
    report.add("logprob_difference", float(np.abs(found.topk_logprobs - expected.logprobs).max()), "<= 1e-4")


@contextmanager
def _little_gpu_memory() -> Iterator[None]:
    """Leave this process ``OOM_HEADROOM_BYTES`` beyond what it holds: the logits of the budget are larger."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + OOM_HEADROOM_BYTES) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def _little_memory(backend: TransformersBackend, *, most_tokens: int) -> Iterator[None]:
    """Let the body run out of memory above so many tokens, as a GPU's allocator says it."""
    body = backend._body

    def small(input_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        if input_ids.numel() > most_tokens:
            raise torch.OutOfMemoryError("out of memory: more tokens than this check lets through")
        return body(input_ids, **arguments)

    backend._body = small
    try:
        yield
    finally:
        backend._body = body
