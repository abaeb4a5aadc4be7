"""The files of a dataset: Parquet, JSON lines (also compressed) and plain text, on disk or behind any fsspec URL."""

import functools
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, TypeVar

import pyarrow as pa

from stages.contract.filesystem import check_reachable, open_filesystem, patiently
from stages.models.config import file_sha256
from stages.shard.config import DatasetConfig

Result = TypeVar("Result")
Format = Literal["parquet", "jsonl", "txt"]

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
CODECS: Final = {".zst": "zstd", ".gz": "gzip"}
_EXPECTED: Final = "expected .parquet, .jsonl (also .jsonl.zst, .jsonl.gz), .json with one object a line, or .txt"
_BUFFER_BYTES = 2**20


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
        codec = next((codec for suffix, codec in CODECS.items() if name.lower().endswith(suffix)), None)
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
