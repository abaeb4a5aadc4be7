"""The layout of our Parquet files: which encoding each column has, and that every usual reader gets the values back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from stages.contract import schemas
from stages.contract.columns import SparseRows, list_column, round_to_half, sparse_columns
from stages.contract.store import Store

LENGTHS = (300, 1, 47)
CANDIDATES = ("llama", "neox")


def sparse(rng: np.random.Generator, vocab_size: int) -> tuple[pa.Array, pa.Array]:
    """Rows of 0 to 10 entries, the largest id among them."""
    rows = []
    for length in LENGTHS:
        ids = rng.integers(0, vocab_size, (length, 10)).astype(np.int32)
        ids[0, 0] = vocab_size - 1
        logprobs = round_to_half(-np.sort(rng.gamma(2, 3, (length, 10)), axis=1))
        missing = np.arange(10) >= rng.integers(0, 11, (length, 1))
        missing[0, 0] = False
        rows.append(SparseRows(np.where(missing, -1, ids), np.where(missing, -np.inf, logprobs).astype(np.float32)))
    return sparse_columns(rows, schemas.id_type(vocab_size))


def values_of(field: pa.Field, rng: np.random.Generator, vocab_size: int) -> pa.Array:
    """Three rows of what a column may hold."""
    kind = field.type
    if not pa.types.is_list(kind):
        made: dict[str, list[Any]] = {"string": ["train", "", "é\n"], "bool": [True, False, True]}
        return pa.array(made.get(str(kind), [2**31 - 1, 0, 7]), kind)
    element = kind.value_type
    if pa.types.is_string(element):
        names = np.array(["system", "user", "assistant"])
        return pa.array([names[rng.integers(0, 3, length)].tolist() for length in LENGTHS], kind)
    if field.name == "byte_end":
        return list_column([np.cumsum(rng.integers(0, 9, length)) for length in LENGTHS], element)
    if pa.types.is_floating(element):
        gold = [round_to_half(-rng.gamma(2, 3, length).astype(np.float32)) for length in LENGTHS]
        for row in gold if field.name in ("gold_logprob", "completed_logprob") else ():
            row[-1] = np.nan  # no next token
        return list_column(gold, element)
    largest = {pa.uint8(): 4, pa.int8(): 2, pa.bool_(): 2}.get(element, vocab_size)
    return list_column([rng.integers(0, largest, length) for length in LENGTHS], element)


def table_of(schema: pa.Schema, vocab_size: int) -> pa.Table:
    rng = np.random.default_rng(0)
    ids, logprobs = sparse(rng, vocab_size)
    own = {"topk_ids": ids, "topk_logprobs": logprobs, "sample_ids": ids}
    columns = [own.get(field.name) for field in schema]
    return pa.Table.from_arrays(
        [
            values_of(field, rng, vocab_size) if made is None else made
            for field, made in zip(schema, columns, strict=True)
        ],
        schema=schema,
    )


SCHEMAS = {
    "shard": (schemas.SHARD, 400),
    "shard of conversations": (schemas.shard_schema(conversations=True), 400),
    "quarantine": (schemas.QUARANTINE, 400),
    "logits of 32,000": (schemas.logits_schema(32_000), 32_000),
    "logits of 262,144": (schemas.logits_schema(262_144), 262_144),
    "logits with draws": (schemas.logits_schema(32_000, has_draws=True), 32_000),
    "logits of conversations": (schemas.logits_schema(32_000, conversations=True), 32_000),
    "aligned": (schemas.aligned_schema(2**16, "bucket"), 2**16),
    "aligned with draws": (schemas.aligned_schema(2**16, "bucket", has_draws=True), 2**16),
    "fused": (schemas.fused_schema(151_936, "bucket", CANDIDATES), 151_936),
    "fused of conversations": (schemas.fused_schema(32_000, "bucket", CANDIDATES, conversations=True), 32_000),
}


def plain(value: Any) -> Any:
    """Lists all the way down, NaN as None: what the readers call a missing number differs."""
    if isinstance(value, np.ndarray | list):
        return [plain(part) for part in value]
    return None if isinstance(value, float | np.floating) and np.isnan(value) else value


def read_pandas(file: str) -> list[dict[str, Any]]:
    return pd.read_parquet(file).to_dict("records")


def read_polars(file: str) -> list[dict[str, Any]]:
    return pl.read_parquet(file).to_dicts()


def read_duckdb(file: str) -> list[dict[str, Any]]:
    found = duckdb.execute("select * from read_parquet(?)", [file])
    names = [column[0] for column in found.description]
    return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def read_datasets(file: str) -> list[dict[str, Any]]:
    cache = str(Path(file).parent / "cache")
    return load_dataset("parquet", data_files=file, split="train", cache_dir=cache).to_list()


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("read", [read_pandas, read_polars, read_duckdb, read_datasets])
def test_every_reader_gets_the_values_without_our_code(
    tmp_path: Path, name: str, read: Callable[[str], list[dict[str, Any]]]
) -> None:
    table = table_of(*SCHEMAS[name])
    Store(str(tmp_path)).write_table("a.parquet", table)
    found = [{name: plain(value) for name, value in row.items()} for row in read(str(tmp_path / "a.parquet"))]
    assert found == [{name: plain(value) for name, value in row.items()} for row in table.to_pylist()]


@pytest.mark.parametrize("name", SCHEMAS)
def test_each_column_has_the_encoding_that_suits_it(tmp_path: Path, name: str) -> None:
    Store(str(tmp_path)).write_table("a.parquet", table_of(*SCHEMAS[name]))
    group = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0)
    for index in range(group.num_columns):
        column = group.column(index)
        assert column.compression == "ZSTD"
        found = set(column.encodings) - {"RLE", "PLAIN"}
        assert found == expected_encoding(column.path_in_schema), column.path_in_schema


def expected_encoding(path: str) -> set[str]:
    name = path.split(".", maxsplit=1)[0]
    if name == "byte_end":
        return {"DELTA_BINARY_PACKED"}
    if name in ("split", "text", "stage", "error", "message", "outcome", "chosen", "message_role", "role"):
        return {"RLE_DICTIONARY"}
    return set() if name in ("is_last", "exact_context", "message_trained", "is_trained") else {"BYTE_STREAM_SPLIT"}


def test_real_shaped_rows_take_few_bytes(tmp_path: Path) -> None:
    """Against the writer's own defaults; the sizes on real logits are in ``make bench``."""
    rng = np.random.default_rng(1)
    size = 20_000
    ids = np.minimum(rng.zipf(1.2, (size, 10)), 31_999).astype(np.int32)
    logprobs = round_to_half(-np.sort(rng.gamma(2, 3, (size, 10)), axis=1))
    topk = sparse_columns([SparseRows(ids, logprobs)], pa.uint16())
    columns = [
        pa.array([0], pa.int64()),
        pa.array([0], pa.int32()),
        list_column([np.minimum(rng.zipf(1.2, size), 31_999)], pa.uint16()),
        list_column([np.cumsum(rng.integers(1, 9, size))], pa.int32()),
        list_column([round_to_half(-rng.gamma(2, 3, size))], pa.float32()),
        *topk,
    ]
    table = pa.Table.from_arrays(columns, schema=schemas.logits_schema(32_000))
    ours = Store(str(tmp_path)).write_table("ours.parquet", table).num_bytes
    pq.write_table(table, tmp_path / "default.parquet", compression="zstd")
    assert ours < 0.75 * (tmp_path / "default.parquet").stat().st_size
