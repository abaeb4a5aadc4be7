"""Training blocks as a table: tokens, the pieces of segments that they hold, and the fused distributions."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.contract.columns import PAD_ID, SparseRows, list_column, list_row, sparse_columns
from stages.contract.roles import has_roles
from stages.fuse.explanation import SegmentPosition
from stages.fuse.pack import Packing


@dataclass(frozen=True)
class SegmentColumns:
    """Columns that are written for one segment of N positions.

    Attributes:
        rows: the fused distributions.
        tail_mass: (N,) mass that they do not list.
        chosen: (N,) int8, the candidate with the largest weight; -1 where there is no fused distribution.
    """

    rows: SparseRows
    tail_mass: np.ndarray
    chosen: np.ndarray


def block_table(target: pa.Table, packing: Packing, segments: Sequence[SegmentColumns], schema: pa.Schema) -> pa.Table:
    """Put segments into blocks.

    Args:
        target: the target's logits table, a segment in each row.
        packing: which piece of which segment is in which block.
        segments: the fused columns of each segment.
        schema: see ``schemas.fused_schema``.
    """
    lengths = pc.list_value_length(target["token_ids"]).to_numpy().astype(np.int64)
    borders = np.flatnonzero(packing.start == 0)[1:]

    def pieces(values: np.ndarray) -> list[np.ndarray]:
        return np.split(values, borders) if packing.num_blocks else []

    block_starts = np.append(0, np.cumsum(packing.length))[np.append(np.flatnonzero(packing.start == 0), -1)]

    def blocks(flat: np.ndarray) -> list[np.ndarray]:
        return [flat[start:end] for start, end in itertools.pairwise(block_starts)]

    tokens = packing.tokens(lengths)
    ids, logprobs = (
        column[tokens] for column in _stack_rows([segment.rows for segment in segments], int(packing.length.sum()))
    )
    sparse = [
        SparseRows(block_ids, block_logprobs)
        for block_ids, block_logprobs in zip(blocks(ids), blocks(logprobs), strict=True)
    ]
    token_ids = pc.list_flatten(target["token_ids"]).to_numpy()[tokens]
    segment_ids = target["segment"].to_numpy()
    columns = {
        "block": pa.array(np.arange(packing.num_blocks), pa.int32()),
        "token_ids": list_column(blocks(token_ids), schema.field("token_ids").type.value_type),
        "piece_start": list_column(pieces(packing.start), pa.int32()),
        "piece_doc_id": list_column(pieces(target["doc_id"].to_numpy()[packing.segment]), pa.int64()),
        "piece_segment": list_column(pieces(segment_ids[packing.segment]), pa.int32()),
        "piece_offset": list_column(pieces(packing.offset), pa.int32()),
        "chosen": list_column(
            blocks(_concatenate([segment.chosen for segment in segments], np.int8)[tokens]), pa.int8()
        ),
    }
    columns["topk_ids"], columns["topk_logprobs"] = sparse_columns(
        sparse, schema.field("topk_ids").type.value_type.value_type
    )
    if has_roles(target):
        is_trained = pc.list_flatten(target["is_trained"]).to_numpy(zero_copy_only=False)[tokens]
        columns["is_trained"] = list_column(blocks(is_trained), pa.bool_())
    if "tail_mass" in schema.names:
        tail = _concatenate([segment.tail_mass for segment in segments], np.float32)[tokens]
        columns["tail_mass"] = list_column(blocks(tail), pa.float32())
    return pa.table([columns[name] for name in schema.names], schema=schema)


def locate(fused: pa.Table, block: int, position: int) -> SegmentPosition:
    """Find the segment, and the position in it, of a position of a training block.

    Args:
        fused: the shard's fuse table.
        block: the block's row.
        position: position in the block.

    Raises:
        IndexError: the shard has no such block, or the block no such position.
    """
    if not 0 <= block < fused.num_rows:
        raise IndexError(f"no block {block}: the shard has {fused.num_rows} blocks, from 0")
    length = len(fused["token_ids"][block])
    if not 0 <= position < length:
        raise IndexError(f"no position {position}: block {block} has {length} tokens, from 0")
    start = list_row(fused, "piece_start", block)
    piece = int(np.searchsorted(start, position, side="right")) - 1
    return SegmentPosition(
        doc_id=int(list_row(fused, "piece_doc_id", block)[piece]),
        segment=int(list_row(fused, "piece_segment", block)[piece]),
        position=int(list_row(fused, "piece_offset", block)[piece] + position - start[piece]),
    )


def _stack_rows(segments: Sequence[SparseRows], num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Stack the rows of all segments, padded to the widest."""
    width = max((segment.ids.shape[1] for segment in segments), default=0)
    ids = np.full((num_rows, width), PAD_ID, np.int32)
    logprobs = np.full((num_rows, width), -np.inf, np.float32)
    end = 0
    for segment in segments:
        start, end = end, end + len(segment)
        ids[start:end, : segment.ids.shape[1]] = segment.ids
        logprobs[start:end, : segment.ids.shape[1]] = segment.logprobs
    return ids, logprobs


def _concatenate(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)
