"""The formats in which documents lie on disk: Parquet, JSON lines, text."""

import codecs
import itertools
import json
from collections.abc import Iterator
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.files import CODECS, DatasetError, DatasetFiles, FileRange
from stages.contract.filesystem import is_transient

Chunks = list[tuple[pa.Array, pa.Array | None]]
"""Pieces of a column: texts (large_binary, null where there is none) and, where there can be any, errors (string)."""


_TEXT_TYPES: Final = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
)


_MAX_LINES_PROBED = 100


def require_column(column: str, found: list[str], where: str, setting: str = "text_column") -> None:
    """Refuse data without a column that a setting of ``[dataset]`` names."""
    if column not in found:
        raise DatasetError(
            f"{where} has no column {column!r}: set dataset.{setting} to one of {', '.join(map(repr, found))}"
        )


def open_parquet(stream: BinaryIO, path: str, column: str, setting: str = "text_column") -> pq.ParquetFile:
    """Read a Parquet file's footer.

    Raises:
        DatasetError: it is no Parquet file, or has no such column of text.
    """
    try:
        parquet = pq.ParquetFile(stream)
    except pa.ArrowInvalid as error:
        raise DatasetError(f"{path} is not a whole Parquet file: {error}") from error
    require_column(column, parquet.schema_arrow.names, path, setting)
    kind = parquet.schema_arrow.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(test(kind) for test in _TEXT_TYPES):
        raise DatasetError(
            f"{path}: column {column!r} is {kind}, not text: set dataset.{setting} to a column of strings"
        )
    return parquet


def has_documents(files: DatasetFiles, name: str, column: str, setting: str = "text_column") -> bool:
    """Does a file have rows, with the column? For JSON lines the first object decides."""
    path = files.paths[name]
    with files.open(name) as stream:
        if files.format == "parquet":
            return bool(open_parquet(stream, path, column, setting).metadata.num_rows)
        has_lines = False
        for number, line in enumerate(_lines(stream, path)):
            has_lines = True
            if number == 0 and line.lstrip().startswith(b"["):
                raise DatasetError(f"{path} is one JSON array; expected JSON lines, one object a line: convert it")
            try:
                record = _loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                require_column(column, list(record), path, setting)
                return True
            if number == _MAX_LINES_PROBED:
                break
        if has_lines:
            raise DatasetError(
                f"{path}: none of its first lines is a JSON object; expected JSON lines, one object a line"
            )
        return False


def _whole_lines(stream: BinaryIO, path: str) -> Iterator[bytes]:
    try:
        yield from stream
    except OSError as error:  # also a truncated or damaged compressed stream
        if is_transient(error):
            raise
        raise DatasetError(f"{path} cannot be read to its end: {error}. Is the file whole?") from error


def _lines(stream: BinaryIO, path: str) -> Iterator[bytes]:
    """The lines that are not blank: the rows."""
    return (line for line in _whole_lines(stream, path) if not line.isspace())


def scan_lines(
    files: DatasetFiles, name: str, *, first_row: int, rows_per_shard: int, max_rows: int | None
) -> tuple[int, dict[int, int]]:
    """Count the rows of a JSON lines file, in a stream.

    Args:
        files: the dataset's files.
        name: which one.
        first_row: the dataset's rows in the files before it.
        rows_per_shard: a shard begins at every multiple of this.
        max_rows: stop after so many; None: none is too many.

    Returns:
        The number of rows; and row -> byte at which it begins, for the first and for those at which a shard begins
        (empty for a compressed file, into which one cannot seek).
    """
    can_seek = not name.lower().endswith(tuple(CODECS))
    byte_starts: dict[int, int] = {}
    row, position = 0, 0
    with files.open(name) as stream:
        for line in _whole_lines(stream, files.paths[name]):
            if not line.isspace():
                if row == max_rows:
                    break
                if can_seek and (row == 0 or (first_row + row) % rows_per_shard == 0):
                    byte_starts[row] = position
                row += 1
            position += len(line)
    return row, byte_starts


def read_rows(files: DatasetFiles, part: FileRange, column: str) -> Chunks:
    """A range of a file's rows: their texts, and what is wrong with them.

    Raises:
        FileNotFoundError: the file is gone since it was planned.
        DatasetError: it has changed since.
    """
    if part.file not in files.paths:
        raise FileNotFoundError(f"{part.file} was in the dataset when it was planned, and is gone: put it back")
    found = {"parquet": _read_parquet, "jsonl": _read_lines, "txt": _read_text_file}[files.format](files, part, column)
    num_rows = sum(len(texts) for texts, _ in found)
    if num_rows != part.end - part.start:
        raise _changed(part, f"found {num_rows} rows")
    return found


def _read_parquet(files: DatasetFiles, part: FileRange, column: str) -> Chunks:
    """Decodes the row groups that the range touches, and of the file nothing else."""
    with files.open(part.file) as stream:
        parquet = open_parquet(stream, files.paths[part.file], column)
        sizes = [parquet.metadata.row_group(index).num_rows for index in range(parquet.metadata.num_row_groups)]
        firsts = [sum(sizes[:index]) for index in range(len(sizes))]
        groups = [
            index
            for index, (first, size) in enumerate(zip(firsts, sizes, strict=True))
            if first < part.end and first + size > part.start
        ]
        found: Chunks = []
        row = firsts[groups[0]] if groups else part.start
        for batch in parquet.iter_batches(batch_size=1024, row_groups=groups, columns=[column]):
            start, end = max(part.start - row, 0), min(part.end - row, len(batch))
            if start < end:
                found.append((as_binary(batch.column(0).slice(start, end - start)), None))
            row += len(batch)
            if row >= part.end:
                break
        return found


def _read_text_file(files: DatasetFiles, part: FileRange, column: str) -> Chunks:
    del column  # a text file has none
    with files.open(part.file) as stream:
        return [(pa.array([stream.read()], pa.large_binary()), None)]


def _read_lines(files: DatasetFiles, part: FileRange, column: str) -> Chunks:
    with files.open(part.file) as stream:
        if part.byte_start:
            stream.seek(part.byte_start - 1)
            if stream.read(1) != b"\n":
                raise _changed(part, f"no line begins at byte {part.byte_start}")
        skipped = part.start if part.byte_start is None else 0
        lines = _lines(stream, files.paths[part.file])
        rows = itertools.islice(lines, skipped, skipped + part.end - part.start)
        records = [_text_of_line(line, column) for line in rows]
    texts = pa.array([text for text, _ in records], pa.large_binary())
    return [(texts, pa.array([error for _, error in records], pa.string()))]


def _text_of_line(line: bytes, column: str) -> tuple[bytes | None, str | None]:
    """A record's text (None: null), and what is wrong with the record, if anything."""
    try:
        record = _loads(line)
    except (ValueError, RecursionError) as error:
        return None, f"not a JSON line: {error}; it begins {line[:40]!r}"
    if not isinstance(record, dict):
        return None, f"expected a JSON object with the key {column!r}, found {type(record).__name__}: {line[:40]!r}"
    if column not in record:
        return None, f"no key {column!r}; found {', '.join(map(repr, list(record)[:20])) or 'no key'}"
    text = record[column]
    if text is not None and not isinstance(text, str):
        return None, f"the value of {column!r} is {type(text).__name__}, expected a string"
    # A lone surrogate ("\\ud800") stays visible as bytes that are not UTF-8: the shard stage quarantines it as such.
    return None if text is None else text.encode("utf-8", errors="surrogatepass"), None


def _loads(line: bytes) -> Any:
    return json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))


def as_binary(values: pa.Array) -> pa.Array:
    """Any column of text as bytes, unchecked."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return values.cast(pa.large_binary())


def _changed(part: FileRange, found: str) -> DatasetError:
    return DatasetError(
        f"{part.file} is not the file that was planned: expected rows {part.start} to {part.end}, {found}. Put the file "
        "back, or start a new run"
    )
