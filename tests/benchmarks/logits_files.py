"""Benchmarks of logits files, on real logits of the finished run ``PTAFUSE_RUN``: their size, and the error of rounding."""

import math
import tempfile
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.run.records import recorded_run
from pipeline.run.steps import ResolvedRun
from stages.contract import schemas
from stages.contract.columns import list_row, round_to_half
from stages.contract.draws import SAMPLE_IDS, has_draws, num_draws
from stages.contract.store import Store
from stages.logits.backends.topk import topk_logprobs
from stages.logits.stage import LogitsStage
from stages.measures.cross_entropy import cross_entropy
from stages.measures.teacher import TEACHER_FLOOR
from stages.models.batches import NO_GOLD
from stages.models.config import ModelConfig, load_model
from stages.models.heads import split_head
from stages.models.tokenizer import SegmentTokenizer
from tests.benchmarks import align_data
from tests.benchmarks.figure import Figure
from tests.benchmarks.measure import say

VOCABULARIES = {align_data.TARGET: ("32k", 32_000, 28), align_data.SOURCE: ("152k", 151_936, 36)}
TOP_K = 10
SAMPLED = {"top_k": 16, "tail_samples": 16}
NUM_SEGMENTS = 50
NUM_ROUNDED_SEGMENTS = 24


def _run() -> ResolvedRun:
    return recorded_run(Store(str(align_data.run_folder())))


def _model(name: str) -> ModelConfig:
    return next(model for model in _run().config.models if model.name == name)


@cache
def _logits(name: str) -> pa.Table:
    """Return all committed logits of one of the run's models."""
    return pa.concat_tables([align_data.read(data) for data in align_data.logits_files(name).values()])


def bytes_per_token() -> list[Figure]:
    """Measure bytes per token at k = 10 of whole files, for the run's logits with ids of another vocabulary.

    The ids are renumbered by frequency rank, most frequent first, and folded into the vocabulary. The frequencies are
    those of the run's *validation* text, so that no candidate's rank is known from the logits themselves.
    """
    figures = []
    for name, (suffix, size, goal) in VOCABULARIES.items():
        table = _logits(name)
        ranks = _frequency_ranks(name)
        own = SegmentTokenizer.load(_model(name)).vocabulary.size
        ways = {
            "as they are": (np.arange(own), own),
            "folded": (np.arange(own) % size, size),
            "by rank": (ranks % size, size),
        }
        found = {way: _file_bytes(_renumbered(table, ids, vocab_size)) for way, (ids, vocab_size) in ways.items()}
        text = ", ".join(f"{way} {value:.2f}" for way, value in found.items())
        say(f"{name}, {own} ids, {table.num_rows} segments: {text} bytes per token")
        figures.append(Figure(f"logits.bytes_per_token_{suffix}", found["by rank"], "bytes", f"<= {goal}"))
    return figures


def bytes_per_token_sampled() -> list[Figure]:
    """Measure bytes per token at k = 16 with 16 draws of whole files, with ids of a vocabulary of 32,000.

    The target's model is run again over the run's train segments, as the stage runs it; ids are renumbered as above.
    """
    name, (suffix, size, _) = next(iter(VOCABULARIES.items()))
    store, run = Store(str(align_data.run_folder())), _run()
    stage = LogitsStage(run.config.logits.model_copy(update=SAMPLED), _model(name))
    stage.setup()
    manifests = store.manifests(run.steps["shard"].folder)
    shards = [store.read_table(manifests[shard].data, remake="`make demo`") for shard in sorted(manifests)]
    table = stage.run({"shard": pa.concat_tables(shards)}).table
    ranks = _frequency_ranks(name)
    found = {
        "as they are": _file_bytes(table),
        "by rank": _file_bytes(_renumbered(table, ranks % size, size)),
        "by rank, no draws": _file_bytes(_renumbered(table.drop_columns([SAMPLE_IDS]), ranks % size, size)),
    }
    text = ", ".join(f"{way} {value:.2f}" for way, value in found.items())
    say(f"{name}, {suffix}, {table.num_rows} segments, {SAMPLED}: {text} bytes per token")
    return [Figure("logits.bytes_per_token_sampled", found["by rank"], "bytes", "<= 70")]


def _frequency_ranks(name: str) -> np.ndarray:
    """Return the rank of each id by frequency in the run's validation text, (V,); other ids follow in ascending order."""
    store, run = Store(str(align_data.run_folder())), _run()
    manifests = store.manifests(run.steps["shard"].folder).values()
    rows = pa.concat_tables(
        [store.read_table(manifest.data, remake="`make demo`") for manifest in manifests]
    ).to_pylist()
    tokenizer = SegmentTokenizer.load(_model(name))
    texts = [row["text"] for row in rows if row["split"] == "validation"]
    encodings = tokenizer.encode_batch(texts, is_last=[True] * len(texts))
    counts = np.bincount(np.concatenate([part.ids for part in encodings]), minlength=tokenizer.vocabulary.size)
    ranks = np.empty(len(counts), np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    return ranks


def _renumbered(table: pa.Table, new_ids: np.ndarray, size: int) -> pa.Table:
    """Return the table as the stage would write it now, with ``id`` replaced by ``new_ids[id]``, which is below ``size``."""
    schema = schemas.logits_schema(size, has_draws=has_draws(table))
    width = num_draws(table)

    def sorted_again(ids: np.ndarray) -> np.ndarray:
        """Sort the draws of each position in ascending order."""
        return np.sort(ids.reshape(-1, width), axis=1).ravel() if width else ids

    def renewed(column: pa.Array) -> pa.Array:
        if pa.types.is_list(column.type):
            return pa.ListArray.from_arrays(column.offsets, renewed(column.values))
        if pa.types.is_floating(column.type):
            return pa.array(round_to_half(column.to_numpy(zero_copy_only=False)), column.type, from_pandas=True)
        return pa.array(new_ids[column.to_numpy()], schemas.id_type(size))

    columns = [
        renewed(table[name].combine_chunks())
        if name in ("token_ids", "topk_ids", "gold_logprob", "topk_logprobs")
        else table[name]
        for name in schema.names
        if name != SAMPLE_IDS
    ]
    if has_draws(table):
        outer = table[SAMPLE_IDS].combine_chunks()
        leaf = sorted_again(new_ids[outer.values.values.to_numpy()])
        inner = pa.ListArray.from_arrays(outer.values.offsets, pa.array(leaf, schemas.id_type(size)))
        columns.append(pa.ListArray.from_arrays(outer.offsets, inner))
    return pa.Table.from_arrays(columns, schema=schema)


def _file_bytes(table: pa.Table) -> float:
    with tempfile.TemporaryDirectory() as folder:
        data = Store(folder).write_table("logits.parquet", table)
    return data.num_bytes / sum(map(len, table["token_ids"]))


def float16_nll_cost() -> list[Figure]:
    """Measure how rounding to float16 changes the teacher NLL of the renormalised top 10, and the mean gold logprob."""
    differences = []
    for name in VOCABULARIES:
        logprobs, is_gold, gold = _unrounded(name)
        exact, stored = (_teacher_nll(values, is_gold) for values in (logprobs, round_to_half(logprobs)))
        moved = float((round_to_half(gold) - gold).mean(dtype=np.float64))
        say(
            f"{name}, {len(gold)} tokens: teacher NLL {exact:.5f} -> {stored:.5f}; gold logprob moves {moved:+.1e} nats"
        )
        differences += [abs(stored - exact), abs(moved)]
    return [Figure("logits.float16_nll_cost", max(differences), "nats", "<= 0.001")]


def _unrounded(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for positions with a next token, float32 top-k logprobs (P, k), which are gold, and gold logprobs (P,)."""
    model = _load(name)
    body, head = split_head(model)
    parts = []
    for row in range(min(NUM_ROUNDED_SEGMENTS, _logits(name).num_rows)):
        ids = torch.from_numpy(list_row(_logits(name), "token_ids", row).astype(np.int64))
        gold = torch.cat([ids[1:], torch.tensor([NO_GOLD])])
        size = SegmentTokenizer.load(_model(name)).vocabulary.size
        with torch.inference_mode():
            top = topk_logprobs(body(ids[None])[0], head, gold, top_k=TOP_K, num_valid=size, chunk_positions=256)
        parts.append((top.logprobs[:-1], (top.ids == gold[:, None])[:-1], top.gold_logprob[:-1]))
    logprobs, is_gold, gold_logprob = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return logprobs, is_gold, gold_logprob


def _teacher_nll(logprobs: np.ndarray, is_gold: np.ndarray) -> float:
    probs = np.exp(logprobs.astype(np.float64))
    found = (probs * is_gold).sum(axis=1) / probs.sum(axis=1)
    return float(-np.log(np.maximum(found, TEACHER_FLOOR)).mean())


def bits_per_byte_vs_plain() -> list[Figure]:
    """Compare bits per byte of 50 segments from the run's files with ``model(ids, labels=...).loss``, for both models."""
    differences = []
    for name in VOCABULARIES:
        table, model = _logits(name), _load(name)
        is_special = SegmentTokenizer.load(_model(name)).vocabulary.is_special
        nats, plain, num_bytes = 0.0, 0.0, 0
        for row in range(min(NUM_SEGMENTS, table.num_rows)):
            ids = list_row(table, "token_ids", row).astype(np.int64)
            byte_end = list_row(table, "byte_end", row)
            stored = cross_entropy(list_row(table, "gold_logprob", row), byte_end, is_special[ids])
            nats, num_bytes = nats + stored.nats, num_bytes + stored.num_bytes
            plain += _plain_nats(model, ids, is_special)
        found, expected = (total / math.log(2) / num_bytes for total in (nats, plain))
        say(f"{name}, {row + 1} segments, {num_bytes} bytes: {found:.6f} bits per byte, model(...).loss {expected:.6f}")
        differences.append(abs(found - expected))
    return [Figure("logits.bits_per_byte_vs_plain", max(differences), "bits per byte apart", "<= 0.001")]


@torch.inference_mode()
def _plain_nats(model: Any, ids: np.ndarray, is_special: np.ndarray) -> float:
    """Return transformers' own loss, summed: its mean loss times the number of labels."""
    labels = torch.from_numpy(np.where(is_special[ids], -100, ids))[None]
    loss = model(input_ids=torch.from_numpy(ids)[None], labels=labels, use_cache=False).loss
    return float(loss) * int((labels[:, 1:] != -100).sum())


def _load(name: str) -> Any:
    return load_model(_model(name), dtype=_run().config.logits.dtype, attention=("sdpa", "eager"), device="cpu")
