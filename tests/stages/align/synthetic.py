"""Logits tables with real tokens and made-up distributions: peaked, over tokens of the text, the gold one among them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from stages.contract import schemas
from stages.contract.columns import SparseRows, ids_column, list_column, round_to_half, sparse_columns, sparse_row
from stages.models.config import ModelConfig
from stages.models.tokenizer import SegmentTokenizer
from tests.tiny_tokenizers import FAMILIES, save_tokenizer

HALF = 2.0**-11
"""Largest relative error of a number rounded to float16's precision, as stored tail masses are."""


def save_families(folder: Path) -> dict[str, ModelConfig]:
    """Save the four families of tiny tokenizers, and ``coarse``, a byte-level BPE of many more merges."""
    found = {family: ModelConfig(name=family, path=save_tokenizer(family, folder / family)) for family in FAMILIES}
    coarse = save_tokenizer("byte-bpe", folder / "coarse", vocab_size=1000)
    return {**found, "coarse": ModelConfig(name="coarse", path=coarse)}


def logits_table(
    tokenizer: SegmentTokenizer,
    documents: Sequence[Sequence[str]],
    *,
    top_k: int = 10,
    gold_rate: float = 0.8,
    seed: int = 0,
    with_start: bool = True,
    with_end: bool = False,
) -> pa.Table:
    """Return a table of ``logits_schema``.

    Args:
        tokenizer: the model's.
        documents: the segments of each.
        top_k: entries of a distribution.
        gold_rate: how often the gold next token is among them.
        seed: of the distributions.
        with_end: EOS is a candidate where it is the gold token.
        with_start: there are candidates for the first word of a text, which a dummy prefix may write otherwise.
    """
    rng = np.random.default_rng(seed)
    keys = [(doc, number) for doc, segments in enumerate(documents) for number in range(len(segments))]
    texts = [text for segments in documents for text in segments]
    ends = [number == len(documents[doc]) - 1 for doc, number in keys]
    encodings = tokenizer.encode_batch(texts, is_last=ends)
    seen = np.concatenate([encoding.ids for encoding in encodings])
    seen = seen[~tokenizer.vocabulary.is_special[seen]]  # special candidates have tests of their own
    rows, golds = [], []
    for encoding in encodings:
        row, gold = _distributions(
            encoding.ids, seen, top_k, gold_rate, rng, tokenizer.vocabulary.is_special & (not with_end)
        )
        if not with_start:
            row.ids[encoding.byte_end == 0], row.logprobs[encoding.byte_end == 0] = -1, -np.inf
        rows.append(row)
        golds.append(gold)
    size = tokenizer.vocabulary.size
    ids, logprobs = sparse_columns(rows, schemas.id_type(size))
    columns = {
        "doc_id": pa.array([doc for doc, _ in keys], pa.int64()),
        "segment": pa.array([number for _, number in keys], pa.int32()),
        "token_ids": list_column([encoding.ids for encoding in encodings], schemas.id_type(size)),
        "byte_end": list_column([encoding.byte_end for encoding in encodings], pa.int32()),
        "gold_logprob": list_column(golds, pa.float32()),
        "topk_ids": ids,
        "topk_logprobs": logprobs,
    }
    return pa.table(columns, schema=schemas.logits_schema(size))


def with_draws(table: pa.Table, *, num_draws: int, vocab_size: int, seed: int = 0) -> pa.Table:
    """Add draws to a table of ``logits_table``: any ids that a row's entries do not have, some of them several times."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in range(table.num_rows):
        window = sparse_row(table, row).ids
        draws = np.sort(rng.integers(0, vocab_size, (len(window), num_draws)), axis=1)
        draws[:, 1:2] = draws[:, :1]
        while (taken := (draws[:, :, None] == window[:, None, :]).any(axis=2)).any():
            draws[taken] = (draws[taken] + 1) % vocab_size
        rows.append(np.sort(draws, axis=1).astype(np.int32))
    columns = [*table.columns, ids_column(rows, schemas.id_type(vocab_size))]
    return pa.table(columns, schema=schemas.logits_schema(vocab_size, has_draws=True))


def _distributions(
    token_ids: np.ndarray,
    seen: np.ndarray,
    top_k: int,
    gold_rate: float,
    rng: np.random.Generator,
    is_special: np.ndarray,
) -> tuple[SparseRows, np.ndarray]:
    size = len(token_ids)
    ids = np.full((size, top_k), -1, np.int32)
    logprobs = np.full((size, top_k), -np.inf, np.float32)
    gold = np.full(size, np.nan, np.float32)
    for position in range(size):
        drawn = np.unique(rng.choice(seen, size=2 * top_k))
        rng.shuffle(drawn)
        next_token = token_ids[position + 1] if position + 1 < size else -1
        has_gold = next_token >= 0 and rng.random() < gold_rate and not is_special[next_token]
        drawn = drawn[drawn != next_token][: top_k - has_gold]
        if has_gold:
            place = min(len(drawn), rng.geometric(0.5) - 1)
            drawn = np.insert(drawn, place, next_token)
        weights = np.sort(rng.gumbel(size=len(drawn)) * 2)[::-1]
        mass = rng.uniform(0.7, 0.99)
        values = weights - np.log(np.exp(weights).sum()) + np.log(mass)
        ids[position, : len(drawn)] = drawn
        logprobs[position, : len(drawn)] = round_to_half(values)
        if next_token >= 0:
            gold[position] = logprobs[position][ids[position] == next_token][0] if has_gold else np.log(1e-4)
    return SparseRows(ids, logprobs), gold
