"""Files of a dataset, on disk or behind any fsspec URL: names, contents, and identity."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

import pyarrow as pa

from stages.contract.digest import cached_file_sha256
from stages.contract.filesystem import retry_transient
from stages.shard.config import DatasetConfig

Result = TypeVar("Result")
_CODECS: Final = {".zst": "zstd", ".gz": "gzip"}
_BUFFER_BYTES = 2**20


class DatasetError(ValueError):
    """Error of a dataset that cannot be read as configured; the message says what was found and what to do."""


@dataclass(frozen=True)
class FileRange:
    """Rows of one file.

    Attributes:
        file: the file's name under the dataset's folder (so that a dataset may move).
        start: first row.
        end: one past the last row.
        byte_start: offset of row ``start`` in the file, if the format can seek (plain JSON lines); otherwise None.
    """

    file: str
    start: int
    end: int
    byte_start: int | None = None


@dataclass(frozen=True)
class DatasetFiles:
    """Files of a dataset on one filesystem.

    Attributes:
        filesystem: fsspec filesystem that holds the files.
        paths: name under the dataset's folder -> full path, in the order of the documents.
        format: the name of their format, a key of ``formats.FORMATS``.
        section: the section of the configuration that names them, for messages.
        notes: remarks for the user about the choice of files, such as files that are left out.
    """

    filesystem: Any
    paths: dict[str, str]
    format: str
    section: str = "dataset"
    notes: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether the files are on this machine's disk."""
        return is_on_disk(self.filesystem)

    def size(self, name: str) -> int:
        """Return a file's size as stored, in bytes."""
        return int(self.filesystem.size(self.paths[name]))

    def is_compressed(self, name: str) -> bool:
        """Return whether the file is compressed as a whole, so that no reader can seek in it."""
        return _codec(name) is not None

    def open(self, name: str) -> BinaryIO:
        """Open a buffered reader of a file's bytes, decompressed."""
        path = self.paths[name]
        stream: Any = (
            Path(path).open("rb")  # noqa: SIM115  (the caller closes it)
            if self.is_local
            else io.BufferedReader(self.filesystem.open(path, "rb"), _BUFFER_BYTES)
        )
        codec = _codec(name)
        if codec is None:
            return stream
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream, "r"), codec), _BUFFER_BYTES)


def is_on_disk(filesystem: Any) -> bool:
    """Return whether a filesystem of fsspec is this machine's disk."""
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(filesystem, LocalFileSystem)


def reading(dataset: DatasetConfig, read: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function that reads a dataset, and repeat it while its store fails transiently.

    The hub's client repeats requests itself.
    """
    if dataset.path is None:
        return read(*arguments)
    return retry_transient(read, *arguments, url=dataset.path)


def file_identity(files: DatasetFiles, path: str) -> str:
    """Return a string that identifies a file's contents: its sha256, or in an object store its size and ETag.

    A file in an object store is not read for it.
    """
    if files.is_local:
        return cached_file_sha256(Path(path))
    info = retry_transient(files.filesystem.info, path, url=path)
    etag = next((info[key] for key in ("ETag", "etag", "md5Hash") if info.get(key)), None)
    return f"{info['size']}:{etag or files.filesystem.ukey(path)}"


def _codec(name: str) -> str | None:
    return next((codec for suffix, codec in _CODECS.items() if name.lower().endswith(suffix)), None)
