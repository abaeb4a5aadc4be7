"""The files of a dataset: Parquet, JSON lines (also compressed) and plain text, on disk or behind any fsspec URL."""

import codecs
import functools
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from stages.contract.filesystem import check_reachable, is_transient, open_filesystem, patiently
from stages.models.config import file_sha256
from stages.shard.config import DatasetConfig

Result = TypeVar("Result")
Format = Literal["parquet", "jsonl", "txt"]
Chunks = list[tuple[pa.Array, pa.Array | None]]
"""Pieces of a column: texts (large_binary, null where there is none) and, where there can be any, errors (string)."""

_FORMATS: Final[dict[str, Format]] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".jsonl.zst": "jsonl",
    ".json.zst": "jsonl",
    ".jsonl.gz": "jsonl",
    ".json.gz": "jsonl",
    ".txt": "txt",
}
_CODECS: Final = {".zst": "zstd", ".gz": "gzip"}
_EXPECTED: Final = "expected .parquet, .jsonl (also .jsonl.zst, .jsonl.gz), .json with one object a line, or .txt"
_TEXT_TYPES: Final = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
)
_BUFFER_BYTES = 2**20
_MAX_LINES_PROBED = 100


class DatasetError(ValueError):
    """The dataset cannot be read as configured; the message says what was found and what to do."""


@dataclass(frozen=True)
class FileRange:
    """Rows of one file.

    Attributes:
        file: the file's name under the dataset's folder (so that a dataset may move).
        start: first row.
        end: one past the last row.
        byte_start: where row ``start`` begins in the file, if one can go there (plain JSON lines); else None.
    """

    file: str
    start: int
    end: int
    byte_start: int | None = None


@dataclass(frozen=True)
class DatasetFiles:
    """The dataset's files on one filesystem.

    Attributes:
        filesystem: of fsspec.
        paths: name under the dataset's folder -> full path, in the order of the documents.
        format: of all of them.
    """

    filesystem: Any
    paths: dict[str, str]
    format: Format

    @property
    def is_local(self) -> bool:
        """The files are on this machine's disk."""
        from fsspec.implementations.local import LocalFileSystem

        return isinstance(self.filesystem, LocalFileSystem)

    def size(self, name: str) -> int:
        """A file's bytes, as they are stored."""
        return int(self.filesystem.size(self.paths[name]))

    def open(self, name: str) -> BinaryIO:
        """A buffered reader of a file's bytes, decompressed."""
        path = self.paths[name]
        stream: Any = (
            Path(path).open("rb")  # noqa: SIM115  (the caller closes it)
            if self.is_local
            else io.BufferedReader(self.filesystem.open(path, "rb"), _BUFFER_BYTES)
        )
        codec = next((codec for suffix, codec in _CODECS.items() if name.lower().endswith(suffix)), None)
        if codec is None:
            return stream
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream, "r"), codec), _BUFFER_BYTES)


def reading(dataset: DatasetConfig, read: Callable[..., Result], *arguments: Any) -> Result:
    """Call what reads a dataset, again while its store fails in a way that may pass; the hub's client repeats by itself."""
    if dataset.path is None:
        return read(*arguments)
    return patiently(read, *arguments, url=dataset.path)


def find_files(dataset: DatasetConfig) -> DatasetFiles:
    """The dataset's files, sorted by name; those of a hub dataset's split in the order that the hub gives.

    Files on the hub are not downloaded: like those of any other URL, they are read where a shard needs them.

    Raises:
        FileNotFoundError: there is no such file or folder, or a glob matches nothing.
        DatasetError: a file's format is unknown, or a folder has no file of a known one, or several formats.
    """
    if dataset.hub is not None:
        return _hub_files(dataset)
    from fsspec.core import has_magic

    url = str(dataset.path)
    filesystem, root = open_filesystem(url)
    root = root.rstrip("/") or root
    if "://" in url:
        check_reachable(filesystem, root, url)
    kind = _kind(filesystem, root, url)
    if kind == "file":  # first: a file's name may hold a bracket
        base, found = root.rpartition("/")[0], [root]
    elif has_magic(root):
        base = root[: min(root.index(mark) for mark in "*?[" if mark in root)].rpartition("/")[0]
        matches = patiently(filesystem.glob, root, detail=True, url=url)
        found = sorted(path for path, info in matches.items() if info["type"] == "file")
        if not found:
            raise FileNotFoundError(f"dataset.path = {url!r} matches no file; {_EXPECTED}")
    elif kind == "directory":
        base = root
        found = _in_folder(filesystem, root, url)
    else:
        raise FileNotFoundError(
            f"dataset.path = {url!r} is no file or folder (looked for {root}): correct it; a dataset of the Hugging Face hub "
            "is named by dataset.hub and dataset.revision"
        )
    return DatasetFiles(filesystem, {path[len(base) :].lstrip("/"): path for path in found}, _one_format(found, url))


@functools.lru_cache(maxsize=1)
def _hub_files(dataset: DatasetConfig) -> DatasetFiles:
    """The files of a hub dataset's split, at its revision: asked for once a process."""
    import datasets
    import fsspec

    builder = datasets.load_dataset_builder(dataset.hub, name=dataset.subset, revision=dataset.revision)
    splits = {str(split): [str(url) for url in urls] for split, urls in (builder.config.data_files or {}).items()}
    if dataset.split not in splits:
        raise DatasetError(
            f"{dataset.hub} has no split {dataset.split!r}: set dataset.split to one of {', '.join(map(repr, splits))} (for a "
            "part of it give dataset.max_documents)"
        )
    urls = splits[dataset.split]
    filesystem, _ = fsspec.core.url_to_fs(urls[0])
    paths = [filesystem._strip_protocol(url) for url in urls]
    base = len(os.path.commonpath([path.rpartition("/")[0] for path in paths]))
    return DatasetFiles(
        filesystem, {path[base:].lstrip("/"): path for path in paths}, _one_format(paths, str(dataset.hub))
    )


def _one_format(found: list[str], url: str) -> Format:
    """The format of all files.

    Raises:
        DatasetError: it is unknown, or there are several.
    """
    formats = {_format(path) for path in found}
    if None in formats:
        wrong = next(path for path in found if not _format(path))
        raise DatasetError(f"{wrong}: unknown format; {_EXPECTED}")
    if len(formats) > 1:
        raise DatasetError(
            f"{url} mixes {', '.join(sorted(str(kind) for kind in formats))}: say which with a glob, e.g. '{url}/*.parquet'"
        )
    return formats.pop() or "jsonl"


def _kind(filesystem: Any, path: str, url: str) -> str | None:
    """``"file"``, ``"directory"``, or None: fsspec's own ``isfile`` takes a failure of the store for "there is none"."""
    try:
        return patiently(filesystem.info, path, url=url)["type"]
    except FileNotFoundError:
        return None


def _in_folder(filesystem: Any, root: str, url: str) -> list[str]:
    """The files of a folder and those below it whose format is known, sorted."""
    found = [path for path in sorted(patiently(filesystem.find, root, url=url)) if not _is_hidden(path[len(root) :])]
    known = [path for path in found if _format(path)]
    if not known:
        names = ", ".join(path.rpartition("/")[2] for path in found[:5]) or "nothing"
        raise DatasetError(f"the folder {url} has no file that can be read: {_EXPECTED}; found {names}")
    return known


def _format(path: str) -> Format | None:
    matching = [suffix for suffix in _FORMATS if path.lower().endswith(suffix)]
    return _FORMATS[max(matching, key=len)] if matching else None


def _is_hidden(relative: str) -> bool:
    """Spark's ``_SUCCESS``, ``.git``, half-written temporaries: no part of the data."""
    return any(part.startswith((".", "_")) for part in relative.split("/"))


def file_identity(files: DatasetFiles, path: str) -> str:
    """What identifies a file's contents: its sha256; in an object store its size and ETag, without reading it."""
    if files.is_local:
        return file_sha256(Path(path))
    info = patiently(files.filesystem.info, path, url=path)
    etag = next((info[key] for key in ("ETag", "etag", "md5Hash") if info.get(key)), None)
    return f"{info['size']}:{etag or files.filesystem.ukey(path)}"


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
    can_seek = not name.lower().endswith(tuple(_CODECS))
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
