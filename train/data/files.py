"""Fused files of a job, read by row group, on disk or in an object store.

Each file is checked once, by one of the workers. For an object store that is also the only time that a file is read
completely: the worker records where its row groups are and their hashes, and sends these to the others. A worker then
fetches the row groups that it needs, only the columns that it reads, and checks them against these hashes. So every byte
that is trained on goes back to the sha256 in the manifest, and no worker downloads all of the data.

What was fetched stays in a folder that the workers of a machine share, so none of them fetches it a second time:

    <scratch>/<sha256>.parquet      a file that a worker of this machine has checked
    <scratch>/<sha256>-000012.part  the columns that are read of one row group of another file

Both appear atomically. If the disk is nearly full they are not kept, and are fetched again when needed.
"""

import io
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.contract.digest import file_sha256
from stages.contract.filesystem import local_error, open_filesystem, retry_transient
from train.job import FusedFile

logger = logging.getLogger(__name__)

SMALLEST_GAP: Final = 2**16
"""Columns that lie closer to each other than this are fetched by one request: the round trip costs more than the gap."""
FREE_BYTES: Final = 4 * 2**30
"""Space that is left free on the disk, since checkpoints and the model are written to it too."""
REQUESTS: Final = 8
"""Row groups that a worker fetches at the same time."""

Columns = Callable[[pa.Schema], list[str]]
"""Function from a file's schema to the names of the columns that are read."""
Range = tuple[int, int]
"""Half-open range of bytes: start, end."""


class GroupedFile(Protocol):
    """Part of ``pyarrow.parquet.ParquetFile`` that is used here."""

    metadata: pq.FileMetaData
    schema_arrow: pa.Schema

    def read_row_group(self, i: int, columns: list[str]) -> pa.Table:
        """Return some columns of a row group."""


@dataclass(frozen=True)
class FileFacts:
    """Facts about a file that the worker that checked it sends to the others; picklable.

    Attributes:
        metadata: the file's table of contents.
        longest: tokens of its longest block, 0 without blocks.
        group_hashes: sha256 of the bytes that are read of each row group; empty for a file on disk.
    """

    metadata: pq.FileMetaData
    longest: int
    group_hashes: tuple[bytes, ...] = ()


def is_remote(file: FusedFile) -> bool:
    """Return whether a file is behind a URL."""
    return "://" in file.path


def survey(
    files: Sequence[FusedFile], columns: Columns, *, share: tuple[int, int] = (0, 1), scratch: Path | None
) -> dict[int, FileFacts]:
    """Check files against their hashes, and note what every worker needs to know of them.

    Args:
        files: in the order of their shards.
        columns: which are read.
        share: (r, n): of every n files the r-th is checked, the others by other workers.
        scratch: folder for fetched files; needed if one is behind a URL.

    Returns:
        Index of each checked file -> its facts.

    Raises:
        ValueError: a file is missing, or is not the one its manifest names.
        StoreError: it cannot be fetched.
    """
    # A file that is named several times is examined once.
    known: dict[FusedFile, FileFacts] = {}
    facts = {}
    for number, file in enumerate(files):
        if number % share[1] == share[0]:
            if file not in known:
                known[file] = _survey_remote(file, columns, scratch) if is_remote(file) else _survey_local(file)
            facts[number] = known[file]
    return facts


def _survey_local(file: FusedFile) -> FileFacts:
    path = Path(file.path)
    if not path.exists():
        raise ValueError(f"{file.path} is missing: run `ptafuse verify RUN --repair`, then `make fuse`")
    _refuse_other_file(file, file_sha256(path))
    with pq.ParquetFile(path, memory_map=True) as opened:
        return FileFacts(opened.metadata, _longest(opened))


def _survey_remote(file: FusedFile, columns: Columns, scratch: Path | None) -> FileFacts:
    assert scratch is not None, "files behind a URL are fetched to a folder"
    path = scratch / f"{file.sha256}.parquet"
    if not path.exists() or file_sha256(path) != file.sha256:  # of an earlier attempt, or another worker's
        _download(file, path)
    with pq.ParquetFile(path, memory_map=True) as opened:
        metadata = opened.metadata
        names = columns(opened.schema_arrow)
        longest = _longest(opened)
    with path.open("rb") as raw:
        hashes = tuple(
            sha256(b"".join(_local_ranges(raw, column_ranges(metadata, group, names)))).digest()
            for group in range(metadata.num_row_groups)
        )
    if _is_nearly_full(scratch):
        path.unlink(missing_ok=True)
    return FileFacts(metadata, longest, hashes)


def _download(file: FusedFile, path: Path) -> None:
    """Fetch a whole file; it appears under its name when it has been checked."""
    filesystem, key = open_filesystem(file.path)
    temporary = _temporary(path)
    try:
        retry_transient(filesystem.get_file, key, str(temporary), url=file.path)
        _refuse_other_file(file, file_sha256(temporary))
        temporary.replace(path)
    except FileNotFoundError:
        raise ValueError(f"{file.path} is missing: run `ptafuse verify RUN --repair`, then `make fuse`") from None
    finally:
        temporary.unlink(missing_ok=True)


def _refuse_other_file(file: FusedFile, digest: str) -> None:
    if digest != file.sha256:
        raise ValueError(
            f"{file.path} has sha256 {digest}, its manifest says {file.sha256}: the file was changed or truncated "
            "after fuse committed it. Run `ptafuse verify RUN --repair`, then `make fuse`"
        )


def _longest(file: pq.ParquetFile) -> int:
    if not file.metadata.num_rows:
        return 0
    return max(pc.list_value_length(file.read(columns=["token_ids"], use_threads=False)["token_ids"]).to_pylist())


def open_file(file: FusedFile, facts: FileFacts, columns: Columns, *, scratch: Path | None) -> GroupedFile:
    """Open a file that one of the workers has checked.

    Args:
        file: the file.
        facts: facts that this worker found.
        columns: which are read.
        scratch: folder for fetched row groups; needed if the file is behind a URL.

    Raises:
        ValueError: a file on disk is missing.
    """
    if is_remote(file):
        assert scratch is not None, "row groups behind a URL are fetched to a folder"
        return RemoteFile(file, facts, columns, scratch)
    if not Path(file.path).exists():
        raise ValueError(f"{file.path} is missing: run `ptafuse verify RUN --repair`, then `make fuse`")
    return pq.ParquetFile(file.path, memory_map=True, metadata=facts.metadata)


class RemoteFile:
    """A Parquet file in an object store, of which single row groups are fetched."""

    def __init__(self, file: FusedFile, facts: FileFacts, columns: Columns, scratch: Path) -> None:
        """Remember the file; nothing is fetched yet.

        Args:
            file: behind a URL.
            facts: facts from the worker that has checked the file.
            columns: which are read.
            scratch: folder for fetched data, shared by the workers of this machine.
        """
        self.metadata = facts.metadata
        self.schema_arrow = facts.metadata.schema.to_arrow_schema()
        self._file = file
        self._hashes = facts.group_hashes
        self._names = columns(self.schema_arrow)
        self._scratch = scratch
        scratch.mkdir(parents=True, exist_ok=True)
        self._whole = scratch / f"{file.sha256}.parquet"

    def read_row_group(self, i: int, columns: list[str]) -> pa.Table:
        """Return columns of row group ``i``, among those that the file was opened for.

        Raises:
            ValueError: the bytes are not those of the file that was checked.
            StoreError: they cannot be fetched.
        """
        ranges = column_ranges(self.metadata, i, self._names)
        source = pa.PythonFile(_Ranges(ranges, self._read(i, ranges)), mode="r")
        # Nothing is read ahead: that would reach into the gaps between the columns.
        with pq.ParquetFile(source, metadata=self.metadata, pre_buffer=False) as opened:
            return opened.read_row_group(i, columns=columns)

    def is_here(self, group: int) -> bool:
        """Return whether a row group is on this machine's disk."""
        return self._whole.exists() or self._group_path(group).exists()

    def fetch(self, group: int) -> None:
        """Fetch a row group to this machine's disk; nothing where that is nearly full."""
        if not _is_nearly_full(self._scratch):
            self._keep(group, self._download(group, column_ranges(self.metadata, group, self._names)))

    def _group_path(self, group: int) -> Path:
        return self._scratch / f"{self._file.sha256}-{group:06d}.part"

    def _read(self, group: int, ranges: Sequence[Range]) -> bytes:
        """Return the bytes of some ranges, one after the other: from this machine's disk where they are there."""
        group_path = self._group_path(group)
        for path, places in ((self._whole, ranges), (group_path, None)):
            try:
                with path.open("rb") as file:
                    raw = file.read() if places is None else b"".join(_local_ranges(file, places))
            except FileNotFoundError:
                continue
            if sha256(raw).digest() == self._hashes[group]:
                return raw
            logger.warning("%s is damaged (a power cut?): removed and fetched again", path)
            path.unlink(missing_ok=True)
        raw = self._download(group, ranges)
        self._keep(group, raw)
        return raw

    def _download(self, group: int, ranges: Sequence[Range]) -> bytes:
        filesystem, key = open_filesystem(self._file.path)
        try:
            raw = b"".join(
                retry_transient(filesystem.cat_file, key, start=start, end=end, url=self._file.path)
                for start, end in ranges
            )
        except FileNotFoundError:
            raise ValueError(
                f"{self._file.path} was removed during training: run `ptafuse verify RUN --repair`, then `make fuse`"
            ) from None
        if sha256(raw).digest() != self._hashes[group]:
            raise ValueError(
                f"row group {group} of {self._file.path} differs from what was verified when training began: the file "
                "has changed. Run `ptafuse verify RUN --repair`, then `make fuse`"
            )
        return raw

    def _keep(self, group: int, raw: bytes) -> None:
        """Store a row group on this machine's disk, unless that is nearly full."""
        if _is_nearly_full(self._scratch):
            return
        group_path = self._group_path(group)
        temporary = _temporary(group_path)
        try:
            temporary.write_bytes(raw)
            temporary.replace(group_path)
        except OSError as error:
            if local_error(error, str(group_path)) is error:  # neither space nor permissions are the cause
                raise
            logger.warning("%s cannot be kept, and is fetched again when it is needed: %s", group_path, error)
        finally:
            temporary.unlink(missing_ok=True)


def fetch(groups: Iterable[tuple[RemoteFile, int]]) -> None:
    """Fetch the row groups that are not on this machine's disk, several at once.

    Args:
        groups: each a file and the number of a row group in it.
    """
    missing = [(file, group) for file, group in groups if not file.is_here(group)]
    if len(missing) > 1:  # a single one is fetched when it is read
        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(lambda place: place[0].fetch(place[1]), missing))


class _Ranges(io.RawIOBase):
    """File that holds only some byte ranges, at their offsets."""

    def __init__(self, ranges: Sequence[Range], raw: bytes) -> None:
        super().__init__()
        self._ranges = ranges
        self._raw = raw
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        # Readers seek to the end only to learn the size; the footer there is not read.
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._ranges[-1][1]}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        begin = 0
        for start, end in self._ranges:
            if start <= self._position < end:
                first = begin + self._position - start
                raw = self._raw[first : min(first + size, begin + end - start) if size >= 0 else begin + end - start]
                self._position += len(raw)
                return raw
            begin += end - start
        return b""


def column_ranges(metadata: pq.FileMetaData, group: int, names: Sequence[str]) -> list[Range]:
    """Return the byte ranges of some columns of a row group, ascending; those that nearly touch are one.

    Args:
        metadata: Parquet metadata of the file.
        group: the row group.
        names: names of top-level columns.
    """
    row_group = metadata.row_group(group)
    chunks = []
    for number in range(row_group.num_columns):
        chunk = row_group.column(number)
        if chunk.path_in_schema.split(".", 1)[0] in names:
            offsets = [chunk.data_page_offset]
            if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                offsets.append(chunk.dictionary_page_offset)
            start = min(offsets)
            chunks.append((start, start + chunk.total_compressed_size))
    ranges: list[Range] = []
    for start, end in sorted(chunks):
        if ranges and start - ranges[-1][1] <= SMALLEST_GAP:
            ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
        else:
            ranges.append((start, end))
    return ranges


def largest_value(metadata: pq.FileMetaData, name: str) -> int | None:
    """Return the largest number of a column of lists, from the file's statistics; -1 where it holds none.

    Returns:
        None where the file has no statistics.
    """
    largest = -1
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for number in range(row_group.num_columns):
            chunk = row_group.column(number)
            if chunk.path_in_schema.split(".", 1)[0] != name:
                continue
            statistics = chunk.statistics
            if statistics is None or not (statistics.has_min_max or statistics.num_values == 0):
                return None
            if statistics.has_min_max:
                largest = max(largest, int(statistics.max))
    return largest


def merged(surveys: Iterable[Mapping[int, FileFacts]]) -> dict[int, FileFacts]:
    """Return the facts of all files, from what each worker found of its share."""
    return {number: facts for share in surveys for number, facts in share.items()}


def _local_ranges(file: Any, ranges: Sequence[Range]) -> Iterable[bytes]:
    for start, end in ranges:
        file.seek(start)
        yield file.read(end - start)


def _is_nearly_full(folder: Path) -> bool:
    return shutil.disk_usage(folder).free < FREE_BYTES


def _temporary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def scratch_folder() -> "tempfile.TemporaryDirectory[str]":
    """Return a folder that goes with its object, for readers that have no output folder."""
    return tempfile.TemporaryDirectory(prefix="ptafuse-blocks-")
