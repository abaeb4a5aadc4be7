"""Conversion between numpy arrays and the nested columns of our Parquet files.

A row of a table is a segment (or a block); a list column holds one entry per position; a nested list column holds
one sparse distribution per position: ids, and natural logs of probabilities, both in descending order of probability.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

PAD_ID = -1


@dataclass(frozen=True)
class SparseRows:
    """Sparse distributions over a vocabulary, one row per position, padded to a common width.

    Attributes:
        ids: (N, k) int32; ``PAD_ID`` where a row has fewer than k entries. A row of pads is "no distribution".
        logprobs: (N, k) float32, natural logs; -inf at pads.
    """

    ids: np.ndarray
    logprobs: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def present(self) -> np.ndarray:
        """Whether each position has a distribution, (N,) bool."""
        return (self.ids != PAD_ID).any(axis=1)


SegmentKey = tuple[int, int]
"""A segment: its document and its number there."""


def segment_keys(table: pa.Table) -> list[SegmentKey]:
    """Return the document and the segment of every row: the keys by which tables of a shard are joined."""
    return list(zip(table["doc_id"].to_pylist(), table["segment"].to_pylist(), strict=True))


def rows_by_segment(table: pa.Table) -> dict[SegmentKey, int]:
    """Return the row of every segment of a table."""
    return {key: row for row, key in enumerate(segment_keys(table))}


def find_row(table: pa.Table, doc_id: int, segment: int) -> int:
    """Return the row of a segment.

    Raises:
        KeyError: the table does not have it.
    """
    rows = np.flatnonzero((table["doc_id"].to_numpy() == doc_id) & (table["segment"].to_numpy() == segment))
    if not len(rows):
        raise KeyError(f"segment {segment} of document {doc_id} is not in this shard ({table.num_rows} segments)")
    return int(rows[0])


def list_column(rows: Sequence[np.ndarray], element: pa.DataType) -> pa.ListArray:
    """Build a list column from one 1-D array per row. NaN in an array becomes null if ``element`` is a float type."""
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    flat = np.concatenate([np.asarray(row) for row in rows]) if rows else np.empty(0)
    values = pa.array(flat.astype(element.to_pandas_dtype(), copy=False), element, from_pandas=True)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def list_row(table: pa.Table, name: str, row: int) -> np.ndarray:
    """Return one row of a list column as an array; null in a float column becomes NaN."""
    return table[name][row].values.to_numpy(zero_copy_only=False)


def sparse_columns(rows: Sequence[SparseRows], id_type: pa.DataType) -> tuple[pa.ListArray, pa.ListArray]:
    """Build the two nested list columns (ids, logprobs) from one ``SparseRows`` per table row; pads are not stored."""
    keep = [row.ids != PAD_ID for row in rows]
    ids = _nested_column([row.ids for row in rows], keep, id_type)
    logprobs = _nested_column([row.logprobs for row in rows], keep, pa.float32())
    return ids, logprobs


def ids_column(rows: Sequence[np.ndarray], id_type: pa.DataType) -> pa.ListArray:
    """Return a nested list column of ids: one (N, m) array per table row; pads are not stored."""
    return _nested_column(rows, [row != PAD_ID for row in rows], id_type)


def _nested_column(rows: Sequence[np.ndarray], keep: Sequence[np.ndarray], element: pa.DataType) -> pa.ListArray:
    """Return a nested list column: one (N, m) array per table row, of which (N, m) bool says what is stored."""
    inner = np.concatenate([mask.sum(axis=1) for mask in keep]) if rows else np.empty(0, np.int64)
    inner_offsets = np.zeros(len(inner) + 1, np.int32)
    np.cumsum(inner, out=inner_offsets[1:])
    outer_offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=outer_offsets[1:])
    values = np.concatenate([row[mask] for row, mask in zip(rows, keep, strict=True)]) if rows else np.empty(0)
    leaf = pa.array(values.astype(element.to_pandas_dtype(), copy=False), element)
    lists = pa.ListArray.from_arrays(pa.array(inner_offsets), leaf)
    return pa.ListArray.from_arrays(pa.array(outer_offsets), lists)


def padded_ids(table: pa.Table, name: str, row: int) -> np.ndarray:
    """Return one table row of a nested list column of ids, (N, m) int32, with pads where a list is shorter than the longest."""
    lists = table[name][row].values
    lengths = np.diff(lists.offsets.to_numpy())
    mask = np.arange(int(lengths.max(initial=0))) < lengths[:, None]
    ids = np.full(mask.shape, PAD_ID, np.int32)
    ids[mask] = lists.flatten().to_numpy()
    return ids


def sparse_row(table: pa.Table, row: int) -> SparseRows:
    """Return the distributions of one table row (``topk_ids`` and ``topk_logprobs``), padded to the longest."""
    ids_lists = table["topk_ids"][row].values
    logprob_lists = table["topk_logprobs"][row].values
    offsets = ids_lists.offsets.to_numpy()
    lengths = np.diff(offsets)
    width = int(lengths.max(initial=0))
    mask = np.arange(width) < lengths[:, None]
    ids = np.full(mask.shape, PAD_ID, np.int32)
    logprobs = np.full(mask.shape, -np.inf, np.float32)
    ids[mask] = ids_lists.flatten().to_numpy()
    logprobs[mask] = logprob_lists.flatten().to_numpy()
    return SparseRows(ids, logprobs)


def round_to_half(values: np.ndarray) -> np.ndarray:
    """Round to float16's precision, in float32: half the bytes on disk after compression, read by every tool.

    For logprobs and tail masses; NaN stays. Values below float16's range are held at its smallest finite one.
    """
    info = np.finfo(np.float16)
    with np.errstate(over="ignore"):
        return np.clip(values, info.min, info.max).astype(np.float16).astype(np.float32)
