"""FORMATS: file formats of documents. One class per format counts a file's rows and reads a range of them."""

import codecs
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.columns import Column, as_binary, as_json, describe_missing, label_text, wrong_type, wrong_value
from pipeline.dataset.files import DatasetError, DatasetFiles, FileRange
from stages.contract.filesystem import is_transient

Chunks = list[tuple[pa.Array, pa.Array | None]]
"""Pieces of a column: texts (large_binary, null where there is none) and, where there can be any, errors (string)."""

RowStarts = dict[int, int]
"""Row of a file -> byte at which it begins."""

_MAX_LINES_PROBED: Final = 100
"""Lines that are read for a first object, or a first one with a kind, before a file is refused."""
_UTF_16_MARKS: Final = (
    codecs.BOM_UTF16_LE,
    codecs.BOM_UTF16_BE,
    codecs.BOM_UTF32_BE,
)  # that of UTF-32-LE begins as UTF-16's

TEXT: Final = "txt"
"""Name of the format in which a file is one document."""
LINES: Final = "txt lines"
"""Name of the format in which each line of such a file is a document."""


@dataclass(frozen=True)
class RowCount:
    """Limits for counting the rows of a file.

    Attributes:
        first_row: number of rows in the files before it.
        rows_per_shard: a shard begins at every multiple of this.
        max_rows: a count that is at least this large is enough; None: count all.
    """

    first_row: int
    rows_per_shard: int
    max_rows: int | None


class Format(Protocol):
    """File format of the documents of a dataset.

    Attributes:
        name: its key in ``FORMATS``.
        suffixes: endings of its files' names, lower case, those of compressed files included.
        described: its suffixes for people.
        has_columns: its rows have named columns; without, a file has text and nothing else.
        is_compact: its files are compressed inside, so that their text is longer than they are.
    """

    name: str
    suffixes: tuple[str, ...]
    described: str
    has_columns: bool
    is_compact: bool

    def has_documents(self, files: DatasetFiles, name: str, column: Column) -> bool:
        """Return whether a file has rows with the column.

        Args:
            files: the dataset's files.
            name: name of the file.
            column: the column that is wanted.

        Raises:
            DatasetError: the file is not of this format, or has no such column of text.
        """
        ...

    def count(self, files: DatasetFiles, name: str, column: Column, wanted: RowCount) -> tuple[int, RowStarts]:
        """Count a file's rows.

        Args:
            files: the dataset's files.
            name: name of the file.
            column: the column that holds the text.
            wanted: number of rows to count, and the rows whose offsets are needed.

        Returns:
            The number of rows; and where rows begin at which a shard may begin, if the format can seek to them.

        Raises:
            DatasetError: the file cannot be read, or has no such column.
        """
        ...

    def read(self, files: DatasetFiles, file_range: FileRange, column: Column) -> Chunks:
        """Read a range of a file's rows: their texts, and what is wrong with them.

        Raises:
            DatasetError: the file has changed since it was planned.
        """
        ...


class Parquet:
    """Parquet files: rows are counted from the footer, and only the row groups of a range are decoded."""

    name = "parquet"
    suffixes: tuple[str, ...] = (".parquet",)
    described = ".parquet"
    has_columns = True
    is_compact = True

    def has_documents(self, files: DatasetFiles, name: str, column: Column) -> bool:
        """See ``Format``."""
        with files.open(name) as stream:
            parquet = _open_parquet(stream, files, name, column)
            if not parquet.metadata.num_rows:
                return False
            if column.holds_messages:
                self._refuse_other_values(parquet, files, name, column)
            return True

    def _refuse_other_values(self, parquet: pq.ParquetFile, files: DatasetFiles, name: str, column: Column) -> None:
        """Refuse a file whose first value is not a conversation: strings may hold anything.

        Raises:
            DatasetError: says what was found. Damaged files are reported by the shard stage.
        """
        try:
            batch = next(parquet.iter_batches(batch_size=1, columns=[column.name]), None)
        except (pa.ArrowException, OSError) as error:
            if _is_of_storage(error):
                raise
            return
        wrong = None if batch is None else wrong_value(column, batch.column(0)[0].as_py(), files.section)
        if wrong is not None:
            raise DatasetError(f"{files.paths[name]}: {wrong}")

    def count(self, files: DatasetFiles, name: str, column: Column, wanted: RowCount) -> tuple[int, RowStarts]:
        """See ``Format``."""
        del wanted  # the footer holds the number
        with files.open(name) as stream:
            return _open_parquet(stream, files, name, column).metadata.num_rows, {}

    def read(self, files: DatasetFiles, file_range: FileRange, column: Column) -> Chunks:
        """See ``Format``."""
        with files.open(file_range.file) as stream:
            parquet = _open_parquet(stream, files, file_range.file, column)
            sizes = [parquet.metadata.row_group(index).num_rows for index in range(parquet.metadata.num_row_groups)]
            firsts = [sum(sizes[:index]) for index in range(len(sizes))]
            groups = [
                index
                for index, (first, size) in enumerate(zip(firsts, sizes, strict=True))
                if first < file_range.end and first + size > file_range.start
            ]
            chunks: Chunks = []
            for index in groups:
                row = firsts[index]
                try:
                    for batch in parquet.iter_batches(batch_size=1024, row_groups=[index], columns=[column.name]):
                        start, end = max(file_range.start - row, 0), min(file_range.end - row, len(batch))
                        if start < end:
                            chunks.append((as_binary(batch.column(0).slice(start, end - start)), None))
                        row += len(batch)
                        if row >= file_range.end:
                            break
                except (pa.ArrowException, OSError) as error:
                    if _is_of_storage(error):
                        raise
                    raise DatasetError(
                        f"{files.paths[file_range.file]}: row group {index} of {len(sizes)} (rows {firsts[index]} to "
                        f"{firsts[index] + sizes[index]}) cannot be decoded: {error}. The file is damaged: download or "
                        "write it again, or exclude it"
                    ) from error
            return chunks


class JsonLines:
    """JSON lines, one object per line, plain or compressed as a whole; blank lines are not rows."""

    name = "jsonl"
    suffixes: tuple[str, ...] = (".jsonl", ".json", ".jsonl.zst", ".json.zst", ".jsonl.gz", ".json.gz")
    described = ".jsonl (also .jsonl.zst, .jsonl.gz), .json with one object per line"
    has_columns = True
    is_compact = False

    def has_documents(self, files: DatasetFiles, name: str, column: Column) -> bool:
        """See ``Format``; the first object decides, of a column of kinds the first that has one."""
        path = files.paths[name]
        has_lines = False
        without: list[str] | None = None
        with files.open(name) as stream:
            for number, line in enumerate(_lines(stream, path)):
                has_lines = True
                if number == 0:
                    _refuse_utf_16(line, path)
                    if line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                        raise DatasetError(
                            f"{path} is one JSON array; expected JSON lines, one object per line: convert it"
                        )
                try:
                    record = _loads(line)
                except (ValueError, RecursionError):
                    record = None
                if isinstance(record, dict):
                    if column.name not in record and column.holds_labels and number < _MAX_LINES_PROBED:
                        without = list(record) if without is None else without
                        continue
                    if column.name not in record:
                        raise DatasetError(f"{path} {describe_missing(column, list(record), files.section)}")
                    wrong = wrong_value(column, record[column.name], files.section)
                    if wrong is not None:
                        raise DatasetError(f"{path}: {wrong}")
                    return True
                if number == _MAX_LINES_PROBED:
                    break
        if without is not None:
            raise DatasetError(f"{path} {describe_missing(column, without, files.section)}")
        if has_lines:
            raise DatasetError(
                f"{path}: none of its first lines is a JSON object; expected JSON lines, one object per line"
            )
        return False

    def count(self, files: DatasetFiles, name: str, column: Column, wanted: RowCount) -> tuple[int, RowStarts]:
        """See ``Format``: counts the lines in a stream, and stops at ``wanted.max_rows``."""
        del column  # a line without it is a bad record, and is counted
        return _count_lines(files, name, wanted)

    def read(self, files: DatasetFiles, file_range: FileRange, column: Column) -> Chunks:
        """See ``Format``; a line that cannot be read is a row with an error."""
        records = [_text_of_line(line, column) for line in _read_lines(files, file_range)]
        texts = pa.array([text for text, _ in records], pa.large_binary())
        return [(texts, pa.array([error for _, error in records], pa.string()))]


class TextFiles:
    """Plain text: every file is one document, without the byte order mark that it may begin with."""

    name = TEXT
    suffixes: tuple[str, ...] = (".txt",)
    described = ".txt"
    has_columns = False
    is_compact = False

    def has_documents(self, files: DatasetFiles, name: str, column: Column) -> bool:
        """See ``Format``."""
        del files, name, column
        return True

    def count(self, files: DatasetFiles, name: str, column: Column, wanted: RowCount) -> tuple[int, RowStarts]:
        """See ``Format``."""
        del files, name, column, wanted
        return 1, {}

    def read(self, files: DatasetFiles, file_range: FileRange, column: Column) -> Chunks:
        """See ``Format``; a file in UTF-16 is a row with an error."""
        del column
        with files.open(file_range.file) as stream:
            raw = stream.read()
        if raw.startswith(_UTF_16_MARKS):
            error = f"{file_range.file} {_NOT_UTF_8}"
            return [(pa.nulls(1, pa.large_binary()), pa.array([error]))]
        return [(pa.array([raw.removeprefix(codecs.BOM_UTF8)], pa.large_binary()), None)]


class TextLines:
    """Plain text of which every line is a document, without its line end; blank lines are none."""

    name = LINES
    suffixes: tuple[str, ...] = ()  # the setting `documents` chooses it, not a name
    described = TextFiles.described
    has_columns = False
    is_compact = False

    def has_documents(self, files: DatasetFiles, name: str, column: Column) -> bool:
        """See ``Format``."""
        del column
        with files.open(name) as stream:
            line = next(_lines(stream, files.paths[name]), None)
        if line is not None:
            _refuse_utf_16(line, files.paths[name])
        return line is not None

    def count(self, files: DatasetFiles, name: str, column: Column, wanted: RowCount) -> tuple[int, RowStarts]:
        """See ``Format``."""
        del column
        return _count_lines(files, name, wanted)

    def read(self, files: DatasetFiles, file_range: FileRange, column: Column) -> Chunks:
        """See ``Format``."""
        del column
        rows = [line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n") for line in _read_lines(files, file_range)]
        return [(pa.array(rows, pa.large_binary()), None)]


_ALL: Final[tuple[Format, ...]] = (Parquet(), JsonLines(), TextFiles())

FORMATS: Final[dict[str, Format]] = {kind.name: kind for kind in (*_ALL, TextLines())}

_NOT_UTF_8: Final = (
    "begins with a UTF-16 or UTF-32 byte order mark; expected UTF-8: convert it, e.g. `iconv -f UTF-16 -t UTF-8 FILE > "
    "NEW`"
)

EXPECTED: Final = f"expected {', '.join(kind.described for kind in _ALL[:-1])}, or {_ALL[-1].described}"
"""For messages about files of no known format."""


def format_of(path: str) -> Format | None:
    """Return the format of a file by its name, None if it is not known; the longest suffix decides."""
    matching = [(len(suffix), kind.name) for kind in _ALL for suffix in kind.suffixes if path.lower().endswith(suffix)]
    return FORMATS[max(matching)[1]] if matching else None


def changed(file_range: FileRange, reason: str) -> DatasetError:
    """Return the error about a file that changed after the run was planned."""
    return DatasetError(
        f"{file_range.file} changed after the run was planned: expected rows {file_range.start} to {file_range.end}, "
        f"{reason}. Restore the file, or start a new run"
    )


def _open_parquet(stream: BinaryIO, files: DatasetFiles, name: str, column: Column) -> pq.ParquetFile:
    """Read a Parquet file's footer.

    Raises:
        DatasetError: it is not a Parquet file, or has no such column of text or of messages.
    """
    path = files.paths[name]
    try:
        parquet = pq.ParquetFile(stream, page_checksum_verification=True)
        schema = parquet.schema_arrow
        names = schema.names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if _is_of_storage(error):
            raise
        raise DatasetError(
            f"{path} is not a complete Parquet file: {str(error).strip()}. Download or write it again, or exclude it"
        ) from error
    if column.name not in names:
        raise DatasetError(f"{path} {describe_missing(column, names, files.section)}")
    wrong = wrong_type(column, schema.field(column.name).type, files.section)
    if wrong is not None:
        raise DatasetError(f"{path}: {wrong}")
    return parquet


def _is_of_storage(error: Exception) -> bool:
    """Return whether the disk or the store failed; else Arrow speaks of what the file holds, with an OSError too."""
    return isinstance(error, OSError) and (error.errno is not None or is_transient(error))


def _whole_lines(stream: BinaryIO, path: str) -> Iterator[bytes]:
    try:
        yield from stream
    except OSError as error:  # also a truncated or damaged compressed stream
        if is_transient(error):
            raise
        if "too much memory" in str(error):  # zstd's own words for a window that a decoder need not accept
            raise DatasetError(
                f"{path} was compressed with a longer window than is supported ({error}), as `zstd --long` or "
                "`--ultra` does: compress it again without that option, e.g. `zstd -d --long=31 -c FILE | zstd -o "
                "NEW`, or as .gz"
            ) from error
        raise DatasetError(f"{path} cannot be read to its end: {error}. Is the file complete?") from error


def _lines(stream: BinaryIO, path: str) -> Iterator[bytes]:
    """Yield the lines that are not blank: the rows."""
    return (line for line in _whole_lines(stream, path) if not _is_blank(line))


def _is_blank(line: bytes) -> bool:
    """Return whether a line holds no row: only whitespace, or the byte order mark at the start of a file."""
    return line.isspace() or (line.startswith(codecs.BOM_UTF8) and not line.removeprefix(codecs.BOM_UTF8).strip())


def _count_lines(files: DatasetFiles, name: str, wanted: RowCount) -> tuple[int, RowStarts]:
    """Count the rows of a file of lines; see ``Format.count``."""
    can_seek = not files.is_compressed(name)
    byte_starts: RowStarts = {}
    row, position = 0, 0
    with files.open(name) as stream:
        for line in _whole_lines(stream, files.paths[name]):
            if not _is_blank(line):
                if row == wanted.max_rows:
                    break
                if can_seek and (row == 0 or (wanted.first_row + row) % wanted.rows_per_shard == 0):
                    byte_starts[row] = position
                row += 1
            position += len(line)
    return row, byte_starts


def _read_lines(files: DatasetFiles, file_range: FileRange) -> list[bytes]:
    """Read a range of the rows of a file of lines, their line ends with them.

    Raises:
        DatasetError: the file has changed since it was planned.
    """
    with files.open(file_range.file) as stream:
        if file_range.byte_start:
            stream.seek(file_range.byte_start - 1)
            if stream.read(1) != b"\n":
                raise changed(file_range, f"no line starts at byte {file_range.byte_start}")
        skipped = file_range.start if file_range.byte_start is None else 0
        lines = _lines(stream, files.paths[file_range.file])
        return list(itertools.islice(lines, skipped, skipped + file_range.end - file_range.start))


def _refuse_utf_16(line: bytes, path: str) -> None:
    """Refuse a file by its first line.

    Raises:
        DatasetError: it begins with the byte order mark of UTF-16 or UTF-32.
    """
    if line.startswith(_UTF_16_MARKS):
        raise DatasetError(f"{path} {_NOT_UTF_8}")


def _text_of_line(line: bytes, column: Column) -> tuple[bytes | None, str | None]:
    """Return a record's text (None: null), and what is wrong with the record, if anything."""
    try:
        record = _loads(line)
    except (ValueError, RecursionError) as error:
        return None, f"not valid JSON: {error}; the line begins with {line[:40]!r}"
    if not isinstance(record, dict):
        return (
            None,
            f"expected a JSON object with the key {column.name!r}, found {type(record).__name__}: {line[:40]!r}",
        )
    if column.name not in record:
        return None, f"the key {column.name!r} is missing; found {', '.join(map(repr, list(record)[:20])) or 'no keys'}"
    text = record[column.name]
    if column.holds_messages and isinstance(text, list):
        return as_json(text), None
    if column.holds_labels:
        text = label_text(text)
    if text is not None and not isinstance(text, str):
        expected = "a list of messages" if column.holds_messages else "a string"
        return None, f"the value of {column.name!r} is {type(text).__name__}, expected {expected}"
    # A lone surrogate ("\\ud800") stays visible as bytes that are not UTF-8: the shard stage quarantines it as such.
    return None if text is None else text.encode("utf-8", errors="surrogatepass"), None


def _loads(line: bytes) -> Any:
    return json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
