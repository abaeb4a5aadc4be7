"""Fused files made by hand, for tests of training."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.contract.columns import PAD_ID, SparseRows, list_column, sparse_columns
from stages.contract.schemas import fused_schema, id_type, parquet_options
from train.job import FusedFile


def random_rows(rng, length: int, vocab_size: int, *, mass: float, empty: float = 0.2) -> SparseRows:
    """Random sparse rows of 1 to 4 entries; some are empty, and the last always."""
    ids, logprobs = np.full((length, 4), PAD_ID, np.int32), np.full((length, 4), -np.inf, np.float32)
    for row in range(length - 1):
        width = 0 if rng.random() < empty else int(rng.integers(1, 5))
        if width:
            ids[row, :width] = rng.choice(vocab_size, width, replace=False)
            logprobs[row, :width] = np.log(np.sort(rng.dirichlet(np.ones(width)))[::-1] * mass)
    return SparseRows(ids, logprobs)


def fused_table(blocks: list[np.ndarray], vocab_size: int, *, tail: str = "renormalise", seed: int = 0) -> pa.Table:
    """Return a fused table over given tokens; each block is one document of one segment."""
    rng = np.random.default_rng(seed)
    schema = fused_schema(vocab_size, tail, ("target", "source"))
    rows = [random_rows(rng, len(b), vocab_size, mass=0.8 if tail == "bucket" else 1.0) for b in blocks]
    ids, logprobs = sparse_columns(rows, id_type(vocab_size))
    zeros = [np.zeros(1, np.int64) for _ in blocks]
    columns = {
        "block": pa.array(np.arange(len(blocks)), pa.int32()),
        "token_ids": list_column(blocks, id_type(vocab_size)),
        "piece_start": list_column(zeros, pa.int32()),
        "piece_doc_id": list_column([np.array([index]) for index in range(len(blocks))], pa.int64()),
        "piece_segment": list_column(zeros, pa.int32()),
        "piece_offset": list_column(zeros, pa.int32()),
        "chosen": list_column([np.where(part.present, 1, -1) for part in rows], pa.int8()),
        "topk_ids": ids,
        "topk_logprobs": logprobs,
    }
    if tail == "bucket":
        columns["tail_mass"] = list_column([np.where(part.present, 0.2, 0.0) for part in rows], pa.float32())
    return pa.table([columns[name] for name in schema.names], schema=schema)


def replaced_pieces(table: pa.Table, pieces: dict[str, np.ndarray]) -> pa.Table:
    """Return a table of one block with other pieces: column name -> (P,)."""
    for name, values in pieces.items():
        index = table.schema.get_field_index(name)
        field = table.schema.field(name)
        table = table.set_column(index, field, list_column([values], field.type.value_type))
    return table


def save(table: pa.Table, path: Path, *, row_group_size: int | None = None) -> FusedFile:
    """Write a fused table as the pipeline does."""
    pq.write_table(table, path, row_group_size=row_group_size, **parquet_options(table.schema))
    return FusedFile(str(path), hashlib.sha256(path.read_bytes()).hexdigest())


def text_blocks(ids: np.ndarray, length: int, count: int) -> list[np.ndarray]:
    """Blocks cut from a repeated text; the last is short."""
    long = np.tile(ids, -(-length * count // len(ids)))[: length * count - length // 2]
    return [long[start : start + length] for start in range(0, len(long), length)]
