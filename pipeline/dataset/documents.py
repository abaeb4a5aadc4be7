"""Documents of a dataset in a fixed order, and any range of them without reading the others.

Documents are numbered through the dataset's files in the order of their names; a number never depends on how the
documents are split into shards.
"""

import hashlib
import logging
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

import pyarrow as pa

from pipeline.dataset.columns import Column, document_column, kind_column
from pipeline.dataset.files import DatasetError, DatasetFiles, FileRange, file_identity
from pipeline.dataset.find import describe_mixed_splits, find_files
from pipeline.dataset.formats import FORMATS, Chunks, RowCount, changed
from stages.shard.config import DatasetConfig

log = logging.getLogger(__name__)

_LARGE_COMPRESSED_BYTES: Final = 2**28

DOCUMENTS: Final = pa.schema(
    [
        pa.field("doc_id", pa.int64(), nullable=False),  # index of the document in the dataset
        # UTF-8 as it stands in the file, unchecked; of conversations JSON; null where there is none.
        pa.field("text", pa.large_binary()),
        pa.field("error", pa.string()),  # why the record could not be read, else null
    ]
)
"""Schema that ``read_documents`` returns and the shard stage reads."""


@dataclass(frozen=True)
class ShardRange:
    """Documents of one shard, from ``first_doc_id`` on.

    Attributes:
        first_doc_id: the first document's index in the dataset.
        num_documents: number of documents.
        files: ranges of the files that hold them, in order.
    """

    first_doc_id: int
    num_documents: int
    files: tuple[FileRange, ...]

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Restore from the result of ``to_json``."""
        return cls(
            values["first_doc_id"],
            values["num_documents"],
            tuple(FileRange(**file_range) for file_range in values["files"]),
        )


def check_dataset(dataset: DatasetConfig) -> None:
    """Refuse a dataset that cannot be read, before anything is loaded.

    Raises:
        FileNotFoundError: the file or folder does not exist, or a glob matches nothing.
        DatasetError: nothing readable in it, or no such column of text or of kinds (lists those found).
    """
    files = find_files(dataset)
    for note in (*files.notes, describe_mixed_splits(dataset, files)):
        if note:
            log.warning("%s", note)
    _check_kinds(dataset, files)
    kind = FORMATS[files.format]
    if dataset.has_conversations and not kind.has_columns:
        raise DatasetError(
            f"{dataset.section}.messages_column = {dataset.messages_column!r}: plain text files have no columns; give "
            ".parquet or .jsonl files"
        )
    if any(kind.has_documents(files, name, document_column(dataset)) for name in files.paths):
        return
    raise DatasetError(f"{_place(dataset)} holds no documents: its {len(files.paths)} file(s) have no rows")


def dataset_identity(dataset: DatasetConfig) -> str:
    """Return a string that identifies the dataset's contents.

    Returns:
        The hub id, revision, subset and split; or a hash of the files' names and contents (in an object store: of
        their sizes and ETags, or another version that the filesystem reports).
    """
    if dataset.hub is not None:
        subset = f":{dataset.subset}" if dataset.subset else ""
        return f"{dataset.hub}@{dataset.revision}{subset}:{dataset.split}"
    files = find_files(dataset)
    digest = hashlib.sha256()
    for name, path in files.paths.items():
        digest.update(f"{name}:{file_identity(files, path)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def plan_documents(dataset: DatasetConfig, documents_per_shard: int) -> list[ShardRange]:
    """Divide the documents into shards. Reads row counts of Parquet files, and counts the lines of JSON lines files.

    Args:
        dataset: location of the documents.
        documents_per_shard: number of documents in every shard but the last, which may have fewer.

    Raises:
        FileNotFoundError: the file or folder does not exist.
        DatasetError: no documents, or a Parquet file without the text column.
    """
    builder = _ShardBuilder(documents_per_shard, dataset.max_documents)
    files = find_files(dataset)
    for name in files.paths:
        if builder.is_full:
            break
        wanted = RowCount(first_row=builder.num_documents, rows_per_shard=documents_per_shard, max_rows=builder.room)
        num_rows, byte_starts = FORMATS[files.format].count(files, name, document_column(dataset), wanted)
        builder.add(name, num_rows, byte_starts)
        if num_rows and files.is_compressed(name):
            _warn_of_rereading(name, files)
    return builder.shards(_place(dataset))


def read_documents(dataset: DatasetConfig, shard_range: ShardRange) -> pa.Table:
    """Read the documents of one shard.

    Returns:
        A table in the schema ``DOCUMENTS``, ``num_documents`` rows; a JSON line that cannot be read is a row with an
        error and no text, so that it reaches quarantine under its number.

    Raises:
        FileNotFoundError: a file of the plan is gone.
        DatasetError: a file has changed since it was planned.
    """
    return _read_column(dataset, shard_range, document_column(dataset))


def _read_column(dataset: DatasetConfig, shard_range: ShardRange, column: Column) -> pa.Table:
    """Read a column of the documents of one shard; see ``read_documents``."""
    texts: list[pa.Array] = []
    errors: list[pa.Array] = []
    files = find_files(dataset)
    for file_range in shard_range.files:
        for text, error in _read_rows(files, file_range, column):
            texts.append(text)
            errors.append(pa.nulls(len(text), pa.string()) if error is None else error)
    ids = pa.array(range(shard_range.first_doc_id, shard_range.first_doc_id + shard_range.num_documents), pa.int64())
    return pa.Table.from_arrays(
        [ids, pa.chunked_array(texts, pa.large_binary()), pa.chunked_array(errors, pa.string())], schema=DOCUMENTS
    )


def read_kinds(dataset: DatasetConfig, shard_range: ShardRange) -> dict[int, str | None]:
    """Read the kind of every document of a shard, by its number, from ``dataset.kind_column``.

    Returns:
        Numbers as their digits; None if the record has no such key, or its value is empty, or no string or integer.

    Raises:
        FileNotFoundError: a file of the plan is gone.
        DatasetError: a file has changed since it was planned, or has no such column.
    """
    column = kind_column(dataset)
    assert column is not None
    _check_kinds(dataset, find_files(dataset))
    table = _read_column(dataset, shard_range, column)
    kinds = table["text"].to_pylist()
    return {
        doc_id: kind.decode("utf-8", errors="replace") if kind else None
        for doc_id, kind in zip(table["doc_id"].to_pylist(), kinds, strict=True)
    }


def _check_kinds(dataset: DatasetConfig, files: DatasetFiles) -> None:
    column = kind_column(dataset)
    if column is None:
        return
    kind = FORMATS[files.format]
    if not kind.has_columns:
        raise DatasetError(
            f"{dataset.section}.kind_column = {dataset.kind_column!r}: plain text files have no columns; remove it"
        )
    for name in files.paths:
        if kind.has_documents(files, name, column):
            return


def _read_rows(files: DatasetFiles, file_range: FileRange, column: Column) -> Chunks:
    """Read a range of a file's rows, exactly as many as were planned."""
    if file_range.file not in files.paths:
        raise FileNotFoundError(
            f"{file_range.file} was in the dataset when the run was planned, but is missing now: restore it"
        )
    chunks = FORMATS[files.format].read(files, file_range, column)
    num_rows = sum(len(texts) for texts, _ in chunks)
    if num_rows != file_range.end - file_range.start:
        raise changed(file_range, f"found {num_rows} rows")
    return chunks


class _ShardBuilder:
    """Shards that are filled with rows of files, in order."""

    def __init__(self, documents_per_shard: int, max_documents: int | None) -> None:
        self.num_documents = 0
        self._documents_per_shard = documents_per_shard
        self._max_documents = max_documents
        self._shards: list[list[FileRange]] = []

    @property
    def room(self) -> int | None:
        """Number of documents that are still wanted; None: no limit."""
        return None if self._max_documents is None else self._max_documents - self.num_documents

    @property
    def is_full(self) -> bool:
        return self.room == 0

    def add(self, file: str, num_rows: int, byte_starts: dict[int, int]) -> None:
        """Take a file's rows. ``byte_starts``: row -> where it begins in the file, for those where a shard may."""
        if self.room is not None:
            num_rows = min(num_rows, self.room)
        start = 0
        while start < num_rows:
            filled = self.num_documents % self._documents_per_shard
            if not filled:
                self._shards.append([])
            end = min(num_rows, start + self._documents_per_shard - filled)
            self._shards[-1].append(FileRange(file, start, end, byte_starts.get(start)))
            self.num_documents += end - start
            start = end

    def shards(self, where: str) -> list[ShardRange]:
        if not self._shards:
            raise DatasetError(f"{where} holds no documents")
        sizes = [sum(file_range.end - file_range.start for file_range in ranges) for ranges in self._shards]
        return [
            ShardRange(index * self._documents_per_shard, size, tuple(ranges))
            for index, (size, ranges) in enumerate(zip(sizes, self._shards, strict=True))
        ]


def _place(dataset: DatasetConfig) -> str:
    """Return the dataset's name for messages."""
    return str(dataset.path) if dataset.hub is None else f"{dataset.hub}, split {dataset.split}"


def _warn_of_rereading(name: str, files: DatasetFiles) -> None:
    """Warn of large compressed files: no reader can seek in them, so every shard reads them from the beginning."""
    if files.size(name) > _LARGE_COMPRESSED_BYTES:
        log.warning(
            "%s is compressed as a whole, so every shard decompresses it from the beginning. Several smaller files, "
            "plain JSON lines or Parquet are faster to read",
            name,
        )
