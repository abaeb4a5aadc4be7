"""Synthetic fused files in the format of the fuse stage."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.run.stage_table import sharded_stage
from stages.contract.columns import PAD_ID, SparseRows, list_column, round_to_half, sparse_columns
from stages.contract.schemas import fused_schema, id_type
from stages.contract.store import Store
from train.job import FusedFile

LENGTH, TOP_K = 2048, 10
VOCABULARY = 49_152
TAIL = 0.05


def write_files(
    folder: Path,
    *,
    num_tokens: int,
    distinct: int,
    blocks_per_file: int,
    length: int = LENGTH,
    vocab_size: int = VOCABULARY,
) -> tuple[FusedFile, ...]:
    """Write a few files, and list them repeatedly until the list has ``num_tokens`` tokens.

    Args:
        folder: folder to write to.
        num_tokens: total number of tokens in the list.
        distinct: number of files that are written.
        blocks_per_file: blocks per file.
        length: tokens per block.
        vocab_size: size of the target's vocabulary.
    """
    store = Store(str(folder))
    row_group_bytes = sharded_stage("fuse").row_group_bytes
    written = []
    for number in range(distinct):
        table = _table(blocks_per_file, length, vocab_size, np.random.default_rng(number))
        data = store.write_table(f"{number}.parquet", table, row_group_bytes=row_group_bytes)
        written.append(FusedFile(store.full_url(data.key), data.sha256))
    num_files = -(-num_tokens // (blocks_per_file * length))
    return tuple(written[number % distinct] for number in range(num_files))


def _table(num_blocks: int, length: int, vocab_size: int, rng: np.random.Generator) -> pa.Table:
    """Draw tokens by Zipf's law, and rows of 1 to ``TOP_K`` entries with a tail; each block is one document."""
    schema = fused_schema(vocab_size, "bucket", ("target", "source"))
    tokens = [_zipf(rng, length, vocab_size) for _ in range(num_blocks)]
    rows = [_rows(rng, length, vocab_size) for _ in range(num_blocks)]
    ids, logprobs = sparse_columns(rows, id_type(vocab_size))
    zeros = [np.zeros(1, np.int64) for _ in tokens]
    columns = {
        "block": pa.array(np.arange(num_blocks), pa.int32()),
        "token_ids": list_column(tokens, id_type(vocab_size)),
        "piece_start": list_column(zeros, pa.int32()),
        "piece_doc_id": list_column([np.array([index]) for index in range(num_blocks)], pa.int64()),
        "piece_segment": list_column(zeros, pa.int32()),
        "piece_offset": list_column(zeros, pa.int32()),
        "chosen": list_column([rng.integers(0, 2, length) for _ in tokens], pa.int8()),
        "topk_ids": ids,
        "topk_logprobs": logprobs,
        "tail_mass": list_column([round_to_half(TAIL * rng.random(length)) for _ in tokens], pa.float32()),
    }
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _zipf(rng: np.random.Generator, size: int | tuple[int, int], vocab_size: int) -> np.ndarray:
    return np.minimum(rng.zipf(1.2, size), vocab_size - 1)


def _rows(rng: np.random.Generator, length: int, vocab_size: int) -> SparseRows:
    widths = rng.integers(1, TOP_K + 1, length)
    is_pad = np.arange(TOP_K) >= widths[:, None]
    weights = np.where(is_pad, 0.0, np.sort(rng.exponential(size=(length, TOP_K)) ** 3, axis=1)[:, ::-1] + 1e-6)
    probs = (1 - TAIL) * weights / weights.sum(axis=1, keepdims=True)
    logprobs = round_to_half(np.log(np.where(is_pad, 1.0, probs)))
    return SparseRows(
        np.where(is_pad, PAD_ID, _zipf(rng, is_pad.shape, vocab_size)).astype(np.int32),
        np.where(is_pad, -np.inf, logprobs).astype(np.float32),
    )
