"""Training blocks from fused Parquet files, by index, in an order that only seed and epoch determine."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from stages.contract.columns import PAD_ID, SparseRows, list_row, sparse_row
from stages.contract.schemas import tail_of
from train.data.files import FileFacts, RemoteFile, fetch, is_remote, largest_value, open_file, scratch_folder, survey
from train.job import FusedFile
from train.objective.divergence import SparseTargets
from train.objective.loss import IGNORED

CACHE_BYTES = 2**30
"""Memory for decoded row groups; the least recently used ones are dropped and decoded again when needed. If all blocks
fit, each row group is decoded once; otherwise few are reused before they are dropped, since the order is random."""


_IS_TRAINED = "is_trained"
"""Column of blocks of conversations."""


@dataclass(frozen=True)
class Block:
    """Training sequence of N tokens.

    Attributes:
        name: ``<file>:<row>``, for messages.
        ids: (N,) int64.
        labels: (N,) int64, the gold next token; ``IGNORED`` where there is none.
        fused: the fused distributions, N positions; None when they are not read.
        tail_mass: (N,) float32; None where rows are rescaled to 1, or not read.
        position_ids: (N,) int64, counted from 0 in each piece of a document; None where documents are not isolated.
    """

    name: str
    ids: np.ndarray
    labels: np.ndarray
    fused: SparseRows | None
    tail_mass: np.ndarray | None
    position_ids: np.ndarray | None = None


@dataclass(frozen=True)
class MicroBatch:
    """B blocks, padded on the right to a common length T.

    A causal model's states do not depend on what follows, so padding needs no mask; its labels are ``IGNORED``.

    Attributes:
        ids: (B, T) int64.
        labels: (B, T) int64.
        targets: fused distributions of the B * T positions; None if they are not read.
        num_tokens: tokens without padding.
        position_ids: (B, T) int64, which restart with each piece of a document (and with the padding); None where
            documents are not isolated.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    targets: SparseTargets | None
    num_tokens: int
    position_ids: torch.Tensor | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        """Copy to a device; copies from pinned memory are asynchronous."""
        targets = None if self.targets is None else self.targets.to(device)
        return self._with(targets, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "MicroBatch":
        """Copy to pinned memory, from which a GPU copies while the CPU continues."""
        targets = None if self.targets is None else self.targets.pin_memory()
        return self._with(targets, torch.Tensor.pin_memory)

    def _with(self, targets: SparseTargets | None, function: Callable[[torch.Tensor], torch.Tensor]) -> "MicroBatch":
        return replace(
            self,
            ids=function(self.ids),
            labels=function(self.labels),
            targets=targets,
            position_ids=None if self.position_ids is None else function(self.position_ids),
        )


class FusedBlocks:
    """Blocks of all fused files, in the files' order."""

    def __init__(
        self,
        files: Sequence[FusedFile],
        *,
        prefix_id: int | None,
        eos_id: int | None,
        with_distributions: bool,
        isolate_documents: bool = False,
        facts: Mapping[int, FileFacts] | None = None,
        scratch: Path | None = None,
    ) -> None:
        """Open the files.

        Args:
            files: files, in the order of their shards. Of those behind a URL the row groups that are needed are fetched.
            prefix_id: the token before every segment of the target (BOS, or EOS); None without.
            eos_id: the target's EOS, which ends a document; None without.
            with_distributions: read the fused distributions; False: only the tokens (lambda = 1).
            isolate_documents: give position ids by piece, and no label to a piece's last token. A segment that continues its
                document is isolated as well: the models that it was dumped from did not see the text before it.
            facts: facts that the workers found about each file when they checked it, by its index; by default all files are
                checked here.
            scratch: folder for fetched row groups, shared by the workers of this machine; by default a temporary folder.

        Raises:
            ValueError: a file is not the one its manifest names, or there is no block at all; or the blocks hold
                conversations that are not isolated.
        """
        self.prefix_id = prefix_id
        self.eos_id = eos_id
        self.with_distributions = with_distributions
        self.isolate_documents = isolate_documents
        self._temporary = None if scratch or not any(map(is_remote, files)) else scratch_folder()
        scratch = Path(self._temporary.name) if self._temporary else scratch
        columns = partial(columns_read, with_distributions=with_distributions)
        facts = survey(files, columns, scratch=scratch) if facts is None else facts
        self._longest = max((facts[number].longest for number in range(len(files))), default=0)
        self._files = [open_file(file, facts[number], columns, scratch=scratch) for number, file in enumerate(files)]
        self._groups = [
            (file, group, opened.metadata.row_group(group).num_rows)
            for file, opened in enumerate(self._files)
            for group in range(opened.metadata.num_row_groups)
        ]
        self._ends = np.cumsum([rows for _, _, rows in self._groups], dtype=np.int64)
        self._names = [Path(file.path).name for file in files]
        self._columns = [columns(opened.schema_arrow) for opened in self._files]
        self._refuse_conversations_together(isolated=isolate_documents)
        self._cache: OrderedDict[int, tuple[pa.Table, int]] = OrderedDict()  # row group -> its rows, and their bytes
        self._cached_bytes = 0
        if not len(self):
            raise ValueError(
                f"the {len(files)} fused files contain no training blocks: run `make status` to see the results of fuse"
            )

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _refuse_conversations_together(self, *, isolated: bool) -> None:
        """Refuse conversations that see each other: the source models saw each of them on its own."""
        holding = [name for name, columns in zip(self._names, self._columns, strict=True) if _IS_TRAINED in columns]
        if holding and not isolated:
            raise ValueError(
                f"the blocks of {holding[0]} hold conversations, but train.isolate_documents = false lets the "
                "conversations of a block see each other: set train.isolate_documents = true"
            )

    @property
    def max_tokens(self) -> int:
        """Number of tokens of the longest block."""
        return self._longest

    def largest_id(self) -> int:
        """Return the largest token id of all blocks, of their distributions too where these are read.

        It is read from the files' statistics, if this package wrote them.
        """
        names = ["token_ids", "topk_ids"] if self.with_distributions else ["token_ids"]
        largest = -1
        unknown = set()
        for file, opened in enumerate(self._files):
            values = [largest_value(opened.metadata, name) for name in names]
            largest = max(largest, *(value for value in values if value is not None), -1)
            if None in values:
                unknown.add(file)
        for position, (file, _, _) in enumerate(self._groups):
            if file in unknown:
                table = self._row_group(position)
                largest = max(largest, *(_largest(table[name]) for name in names))
        return largest

    def prepare(self, indices: Sequence[int]) -> None:
        """Fetch what blocks need from the object store, several requests at a time; nothing for files on disk."""
        groups = set()
        for index in indices:
            position = self._position(index)
            file, group, _ = self._groups[position]
            opened = self._files[file]
            if position not in self._cache and isinstance(opened, RemoteFile):
                groups.add((opened, group))
        fetch(groups)

    def _position(self, index: int) -> int:
        """Return the index of the row group that holds a block."""
        if not 0 <= index < len(self):
            raise IndexError(f"no block {index}: the files hold {len(self)}, from 0")
        return int(np.searchsorted(self._ends, index, side="right"))

    def block(self, index: int) -> Block:
        """Return block ``index``, counted over all files in order.

        Raises:
            IndexError: the block does not exist.
        """
        # 1. Find the row group, and the row in it, that holds the block.
        position = self._position(index)
        file, _, num_rows = self._groups[position]
        row = index - int(self._ends[position]) + num_rows
        # 2. Read the columns that this job needs.
        table = self._row_group(position)
        ids = list_row(table, "token_ids", row).astype(np.int64)
        fused = tail_mass = None
        if self.with_distributions:
            fused = sparse_row(table, row)
            if tail_of(table.schema) == "bucket":
                tail_mass = list_row(table, "tail_mass", row).astype(np.float32)
        name = f"{self._names[file]}:{int(table['block'][row].as_py())}"
        starts = position_ids = None
        if self.isolate_documents:
            starts = list_row(table, "piece_start", row).astype(np.int64)
            position_ids = piece_positions(starts, len(ids))
        return Block(name, ids, self._labels(table, row, ids, starts), fused, tail_mass, position_ids)

    def _labels(self, table: pa.Table, row: int, ids: np.ndarray, isolated: np.ndarray | None) -> np.ndarray:
        """Return the gold next tokens; ``IGNORED`` at the block's end, and where what follows is another text.

        At the border of two pieces the next token is a label if a document ends there and the next one begins with a special
        token (BOS after EOS), or if the text simply continues without a prefix. The model must not learn a prefix in the
        middle of a document, nor a second EOS between two documents.

        In a conversation a token is a label if ``is_trained`` says so: contents and ends of turns.
        """
        labels = np.append(ids[1:], IGNORED)
        if isolated is not None:
            labels[isolated[1:] - 1] = IGNORED
        if _IS_TRAINED in table.schema.names:
            is_trained = list_row(table, _IS_TRAINED, row)
            labels[:-1][~is_trained[1:]] = IGNORED
            return labels
        starts, docs, segments, offsets = (
            list_row(table, name, row) for name in ("piece_start", "piece_doc_id", "piece_segment", "piece_offset")
        )
        borders = starts[1:]  # the first token of every piece but the first
        begins_document = (segments[1:] == 0) & (offsets[1:] == 0)
        goes_on = (docs[1:] == docs[:-1]) & (segments[1:] == segments[:-1] + 1)
        # Without an EOS in the vocabulary, the tokens do not show where a document ends.
        after_end = begins_document if self.eos_id is None else begins_document & (ids[borders - 1] == self.eos_id)
        is_label = goes_on | after_end if self.prefix_id is None else after_end & (self.prefix_id != self.eos_id)
        labels[borders[~is_label] - 1] = IGNORED
        return labels

    def _row_group(self, position: int) -> pa.Table:
        if position in self._cache:
            self._cache.move_to_end(position)
            return self._cache[position][0]
        file, group, _ = self._groups[position]
        table = self._files[file].read_row_group(group, columns=self._columns[file])
        num_bytes = table.nbytes
        self._cache[position] = table, num_bytes
        self._cached_bytes += num_bytes
        # The total is kept, not summed again: a run has many small row groups.
        while len(self._cache) > 1 and self._cached_bytes > CACHE_BYTES:
            self._cached_bytes -= self._cache.popitem(last=False)[1][1]
        return table


def _largest(ids: pa.ChunkedArray) -> int:
    """Return the largest id of a column of lists, or of lists of lists; -1 where there is none."""
    while pa.types.is_list(ids.type):
        ids = pc.list_flatten(ids)
    largest = pc.max(ids).as_py()
    return -1 if largest is None else int(largest)


def columns_read(schema: pa.Schema, *, with_distributions: bool) -> list[str]:
    """Return the names of the columns that are read of a file with this schema."""
    names = ["block", "token_ids", "piece_start", "piece_doc_id", "piece_segment", "piece_offset"]
    if with_distributions:
        names += ["topk_ids", "topk_logprobs", *(["tail_mass"] if tail_of(schema) == "bucket" else [])]
    return [*names, *([_IS_TRAINED] if _IS_TRAINED in schema.names else [])]


def epoch_order(num_blocks: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the blocks in one epoch, (num_blocks,) int64; a pure function of its arguments."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(num_blocks)


def piece_positions(starts: np.ndarray, length: int) -> np.ndarray:
    """Return position ids of a block that restart with each piece, (length,) int64."""
    positions = np.arange(length, dtype=np.int64)
    return positions - np.repeat(starts, np.diff(np.append(starts, length)))


def collate(blocks: Sequence[Block], *, flatten: bool = False) -> MicroBatch:
    """Pad blocks to the longest of them.

    Args:
        blocks: at least one.
        flatten: lay isolated documents end to end in one row instead, without padding, as FlashAttention wants them.

    Raises:
        ValueError: blocks whose documents are not isolated cannot be flattened.
    """
    if flatten:
        blocks = [_joined(blocks)]
    length = max(len(block.ids) for block in blocks)
    shape = (len(blocks), length)  # (B, T)
    ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    positions = np.zeros(shape, np.int64)
    for row, block in enumerate(blocks):
        size = len(block.ids)
        ids[row, :size], labels[row, :size] = block.ids, block.labels
        if block.position_ids is not None:
            positions[row, :size], positions[row, size:] = block.position_ids, np.arange(length - size)
    return MicroBatch(
        ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        targets=_targets(blocks, length),
        num_tokens=sum(len(block.ids) for block in blocks),
        position_ids=torch.from_numpy(positions) if blocks[0].position_ids is not None else None,
    )


def _joined(blocks: Sequence[Block]) -> Block:
    """Lay blocks end to end; their position ids keep them apart."""
    positions = [block.position_ids for block in blocks if block.position_ids is not None]
    if len(positions) < len(blocks):
        raise ValueError("concatenated blocks would see each other: only isolated documents can be flattened")
    tails = [block.tail_mass for block in blocks if block.tail_mass is not None]
    return Block(
        name=", ".join(block.name for block in blocks),
        ids=np.concatenate([block.ids for block in blocks]),
        labels=np.concatenate([block.labels for block in blocks]),
        fused=_joined_rows([block.fused for block in blocks if block.fused is not None]),
        tail_mass=np.concatenate(tails) if tails else None,
        position_ids=np.concatenate(positions),
    )


def _joined_rows(rows: Sequence[SparseRows]) -> SparseRows | None:
    if not rows:
        return None
    width = max(sparse.ids.shape[1] for sparse in rows)
    gaps = [((0, 0), (0, width - sparse.ids.shape[1])) for sparse in rows]
    return SparseRows(
        np.concatenate(
            [np.pad(sparse.ids, gap, constant_values=PAD_ID) for sparse, gap in zip(rows, gaps, strict=True)]
        ),
        np.concatenate(
            [np.pad(sparse.logprobs, gap, constant_values=-np.inf) for sparse, gap in zip(rows, gaps, strict=True)]
        ),
    )


def _targets(blocks: Sequence[Block], length: int) -> SparseTargets | None:
    fused = [block.fused for block in blocks if block.fused is not None]
    if len(fused) < len(blocks):
        return None
    width = max(1, *(rows.ids.shape[1] for rows in fused))
    ids = np.full((len(blocks), length, width), PAD_ID, np.int64)
    probs = np.zeros((len(blocks), length, width), np.float32)
    tail_mass = np.zeros((len(blocks), length), np.float32)
    for row, (block, rows) in enumerate(zip(blocks, fused, strict=True)):
        ids[row, : len(rows), : rows.ids.shape[1]] = rows.ids
        probs[row, : len(rows), : rows.ids.shape[1]] = np.exp(rows.logprobs)
        if block.tail_mass is not None:
            tail_mass[row, : len(rows)] = block.tail_mass
    has_tail = any(block.tail_mass is not None for block in blocks)
    return SparseTargets(
        ids=torch.from_numpy(ids.reshape(-1, width)),
        probs=torch.from_numpy(probs.reshape(-1, width)),
        tail_mass=torch.from_numpy(tail_mass.reshape(-1)) if has_tail else None,
    )
