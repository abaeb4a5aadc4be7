"""A run directory on local disk or in an object store, behind fsspec: atomic commits, create-if-absent manifests.

Commit of a shard: the table goes to a temporary file, which is reopened and checked (schema, rows, finiteness) and
hashed; then it gets its final name, unique to the attempt; then the manifest is published if there is none yet. Readers
open only files that a manifest names, so nothing half-written is ever read, and two attempts never mix.

Not every object store refuses a second create, and one that does may answer a repeated request as if another process
had been faster. So only the stored bytes count: after publishing, the file is read back, and a process that finds other
bytes than its own has lost the race. See docs/faults.md.
"""

import contextlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from stages.contract import schemas
from stages.contract.digest import file_sha256, sha256
from stages.contract.filesystem import (
    S3_PROTOCOLS,
    StoreError,
    check_reachable,
    local_error,
    open_filesystem,
    retry_transient,
)
from stages.contract.manifest import DataFile, Manifest, manifest_key

Result = TypeVar("Result")

ROW_GROUP_BYTES = 64 * 2**20
"""Size of a row group in memory, about, of files that are read whole."""
UPLOAD_PART_BYTES = 32 * 2**20
"""A file of twice this size or more goes to S3 in parts, several at a time."""
MAX_CREATE_ROUNDS = 5
"""Largest number of times that a file is created again because it was found and then gone when it was read."""
REMOTE_READS = 32
"""Number of small files of an object store that are read in parallel: each costs a round trip, whatever its size."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file as a listing shows it, unopened.

    Attributes:
        key: path of the file in the run directory.
        num_bytes: size of the file.
        modified: time of the last write, in seconds since the epoch; None if the filesystem does not record it.
        version: differs where the contents may: the object's ETag, or size and time of change.
    """

    key: str
    num_bytes: int
    modified: float | None
    version: str


class Store:
    """Files under one root, by key (a relative path with ``/``)."""

    def __init__(self, url: str) -> None:
        """Open a root; nothing is created yet.

        Args:
            url: a local path, or a URL that fsspec knows (``s3://bucket/prefix``).
        """
        self.url = str(url).rstrip("/")
        self._fs, root = open_filesystem(self.url)
        self._root = root.rstrip("/")
        self.is_local = isinstance(self._fs, LocalFileSystem)
        is_s3 = self.url.split("://", 1)[0] in S3_PROTOCOLS
        self._read_options = {"max_concurrency": 1} if is_s3 else {}  # else every read asks for the size first
        self._upload_options = {"chunksize": UPLOAD_PART_BYTES} if is_s3 else {}
        self._homes: dict[str, Store] = {self.url: self}

    def check(self) -> None:
        """Check that a remote store can be used; does nothing for a local one.

        Raises:
            StoreError: the store cannot be used; says what to set.
        """
        if not self.is_local:
            check_reachable(self._fs, self._root, self.url)

    def path(self, key: str) -> str:
        """Return the full path of a key, as its filesystem names it.

        Raises:
            ValueError: the key would leave the run directory.
        """
        if key.startswith("/") or ".." in key.split("/") or "://" in key:
            raise ValueError(
                f"{key!r} is not a path inside the run directory {self.url}: the manifest was tampered with"
            )
        return f"{self._root}/{key}"

    def full_url(self, key: str) -> str:
        """Return the full URL of a key (on local disk its path), for programs that open it themselves."""
        return self.path(key) if self.is_local else self._fs.unstrip_protocol(self.path(key))

    def exists(self, key: str) -> bool:
        """Return whether the file or folder exists."""
        return bool(self._ask(self._fs.exists, self.path(key)))

    def names(self, folder: str) -> list[str]:
        """List the names directly in a folder, sorted; empty if the folder does not exist."""
        path = self.path(folder) if folder else self._root
        no_cache = {} if self.is_local else {"refresh": True}
        try:
            paths = self._ask(self._fs.ls, path, detail=False, **no_cache)
        except FileNotFoundError:
            return []
        entries = {entry.rstrip("/") for entry in paths} - {path.rstrip("/")}  # some consoles store folders as objects
        return sorted(entry.rsplit("/", 1)[-1] for entry in entries)

    def files(self, folder: str) -> list[FileEntry]:
        """List every file in and below a folder, by key.

        An object store is listed in pages, without a request per file.

        Symbolic links are not followed.
        """
        if self.is_local:
            return sorted(_local_files(self.path(folder), folder), key=lambda entry: entry.key)
        try:
            info_by_path = self._ask(self._fs.find, self.path(folder), detail=True)
        except FileNotFoundError:
            return []
        return [
            _remote_entry(name.removeprefix(f"{self._root}/"), info)
            for name, info in sorted(info_by_path.items())
            if info["type"] == "file" and not name.endswith("/")  # some consoles store folders as objects
        ]

    def read_all(self, keys: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Yield the bytes of many small files, in order; files that no longer exist are left out."""
        with contextlib.nullcontext() if self.is_local else ThreadPoolExecutor(REMOTE_READS) as pool:
            contents = (pool.map if pool else map)(self._read_if_there, keys)
            yield from ((key, raw) for key, raw in zip(keys, contents, strict=True) if raw is not None)

    def _read_if_there(self, key: str) -> bytes | None:
        try:
            return Path(self.path(key)).read_bytes() if self.is_local else self.read(key)
        except FileNotFoundError:
            return None

    def read(self, key: str) -> bytes:
        """Read the bytes of a file.

        Raises:
            FileNotFoundError: the file does not exist.
        """
        return self._ask(self._fs.cat_file, self.path(key), **self._read_options)

    def read_file(self, file: DataFile) -> bytes:
        """Read the bytes of a file that a manifest names, unchecked.

        The file is in another run directory if the manifest says so.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the manifest names a run directory that no configuration does.
        """
        return self.home_of(file).read(file.key)

    def home_of(self, file: DataFile) -> "Store":
        """Return the run directory that holds a file named by a manifest: this one, or one shared from.

        Raises:
            ValueError: no configuration that ran here names that run directory as its ``logits_from``, nor one there.
        """
        home = file.home or self.url
        if home not in self._homes:
            self._find_home(home)
        if home not in self._homes:
            raise ValueError(
                f"{self.url}: a manifest says that {file.key} is in {home}, which no configuration that ran here names as "
                "logits_from: the manifest was tampered with, or copied from another run directory. Run `ptafuse verify "
                f"{self.url} --repair`, then the stage's command, with logits_from = {home!r} if its files are wanted"
            )
        return self._homes[home]

    def _find_home(self, home: str) -> None:
        """Open what recorded configurations name as ``logits_from``, here and then in what they name, until it is found.

        Not further: a run directory that is not read need not be there any more.
        """
        unread = list(self._homes.values())
        while unread and home not in self._homes:
            store = unread.pop(0)
            keys = [f"configs/{name}" for name in store.names("configs") if name.endswith(".json")]
            named = {json.loads(raw).get("config", {}).get("logits_from") for _, raw in store.read_all(keys)}
            urls = {url.rstrip("/") for url in named if url} - self._homes.keys()
            self._homes |= {url: Store(url) for url in urls}
            unread += [self._homes[url] for url in urls]

    def delete(self, key: str) -> None:
        """Remove a file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._ask(self._fs.rm_file, self.path(key))

    def create(self, key: str, raw: bytes) -> bool:
        """Publish a small file if there is none of that name: the whole file appears at once.

        Args:
            key: its name.
            raw: content; it distinguishes the processes that compete for the name.

        Returns:
            False if the file holds other bytes; ours are then discarded. (A remote store without conditional create may have
            held ours for a moment: only the bytes that are read back count.)

        Raises:
            StoreError: the file cannot be written, or is removed again and again by someone else.
        """
        for _ in range(MAX_CREATE_ROUNDS):
            try:
                if self.is_local:
                    self._create_local(key, raw)
                elif not self.exists(key):  # where the store ignores the condition, this leaves a moment, not minutes
                    self._ask(self._fs.pipe_file, self.path(key), raw, mode="create")
            except FileExistsError:
                pass  # perhaps written by us: a request whose answer was lost is repeated
            try:
                return self.read(key) == raw
            except FileNotFoundError:
                continue  # removed in the meantime, by `ptafuse verify --repair`
        raise StoreError(f"{self.url}: {key} disappears right after it is written: is another command removing it?")

    def _create_local(self, key: str, raw: bytes) -> None:
        with self._local_temporary(key) as temporary:
            temporary.write_bytes(raw)
            sync(temporary)
            final = Path(self.path(key))
            os.link(temporary, final)
            sync(final.parent)

    def replace(self, key: str, raw: bytes) -> None:
        """Write a small file as a whole, replacing any file of that name."""
        if not self.is_local:
            self._ask(self._fs.pipe_file, self.path(key), raw)
            return
        with self._local_temporary(key) as temporary:
            temporary.write_bytes(raw)
            sync(temporary)
            final = Path(self.path(key))
            temporary.replace(final)
            sync(final.parent)

    def write_table(self, key: str, table: pa.Table, *, row_group_bytes: int = ROW_GROUP_BYTES) -> DataFile:
        """Write a table as one Parquet file, checked and hashed before it gets its name.

        Args:
            key: its name.
            table: the rows.
            row_group_bytes: largest size of a row group in memory, unless a single row is larger: a reader of one row has
                to decode its row group.

        Raises:
            ValueError: the file does not read back as written, or holds a number that is not finite.
        """
        with self._local_temporary(key) as temporary:
            # The writer is given a plain local file and nothing is published until it was read back: a writer that an
            # exception closes leaves a valid but truncated Parquet file.
            rows = max(1, table.num_rows * row_group_bytes // max(1, table.nbytes))
            pq.write_table(table, temporary, row_group_size=rows, **schemas.parquet_options(table.schema))
            _check_parquet(temporary, table, key)
            digest = file_sha256(temporary)
            num_bytes = temporary.stat().st_size
            if self.is_local:
                sync(temporary)
                final = Path(self.path(key))
                temporary.replace(final)
                sync(final.parent)
            else:
                self._ask(self._upload, temporary, self.path(key))
        return DataFile(key=key, sha256=digest, num_bytes=num_bytes)

    def read_table(self, data: DataFile, *, remake: str) -> pa.Table:
        """Read a file that a manifest names, whole, and check its hash first.

        Args:
            data: the file.
            remake: command that computes it again, for the error message.

        Raises:
            ValueError: the file is missing, or is not the one that was committed.
        """
        where = data.home or self.url
        try:
            raw = self.read_file(data)
        except FileNotFoundError:
            raise ValueError(
                f"{where}: {data.key} is missing although its manifest names it. Run `ptafuse verify {self.url} "
                f"--repair`, then {remake}."
            ) from None
        digest = sha256(raw)
        if digest != data.sha256:
            raise ValueError(
                f"{where}: {data.key} is not the file that was committed: expected {data.num_bytes} bytes, sha256 "
                f"{data.sha256[:12]}..., found {len(raw)} bytes, sha256 {digest[:12]}.... Run `ptafuse verify {self.url} "
                f"--repair`, then {remake}."
            )
        # Not pq.read_table: its scanner's threads may still hold the buffer when Python exits, which aborts the process.
        with pq.ParquetFile(pa.BufferReader(raw)) as file:
            return file.read(use_threads=False)

    def upload(self, key: str, file: Path) -> None:
        """Upload a local file to a key of a remote store, replacing any file there."""
        self._ask(self._upload, file, self.path(key))

    def download(self, key: str, file: Path) -> None:
        """Fetch a file; it appears whole.

        Raises:
            FileNotFoundError: the file does not exist.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            self._ask(self._fs.get_file, self.path(key), str(temporary))
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)

    def read_manifest(self, folder: str, shard: int) -> Manifest | None:
        """Read the manifest of a shard; None if it is not done."""
        try:
            raw = self.read(manifest_key(folder, shard))
        except FileNotFoundError:
            return None
        return Manifest.from_bytes(raw)

    def manifests(self, folder: str) -> dict[int, Manifest]:
        """Read all manifests of a stage's folder, by shard."""
        keys = [f"{folder}/manifests/{name}" for name in self.manifest_names(folder)]
        manifests = (Manifest.from_bytes(raw) for _, raw in self.read_all(keys))
        return {manifest.shard: manifest for manifest in manifests}

    def manifest_names(self, folder: str) -> list[str]:
        """List the manifest files of a stage's folder; a killed process may leave other files there."""
        names = self.names(f"{folder}/manifests")
        return [name for name in names if name.startswith("shard-") and name.endswith(".json")]

    def _ask(self, call: Callable[..., Result], *arguments: Any, **keywords: Any) -> Result:
        return retry_transient(call, *arguments, url=self.url, **keywords)

    def _upload(self, file: Path, path: str) -> None:
        """Upload a file, and check that all of it arrived."""
        self._fs.put_file(str(file), path, **self._upload_options)
        arrived, expected = self._fs.info(path)["size"], file.stat().st_size
        if arrived != expected:
            raise ConnectionError(f"{path}: {arrived} of {expected} bytes arrived")

    @contextlib.contextmanager
    def _local_temporary(self, key: str) -> Iterator[Path]:
        """Create a temporary local file, in the destination folder if that is local (so that a rename is atomic)."""
        if not self.is_local:
            with tempfile.TemporaryDirectory(prefix="ptafuse-") as folder:
                yield Path(folder) / "file"
            return
        final = Path(self.path(key))
        temporary = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
        except OSError as error:
            explained = local_error(error, str(final))
            if explained is error:
                raise
            raise explained from error
        finally:
            with contextlib.suppress(OSError):  # if it cannot be removed, a hidden file is left that nothing reads
                temporary.unlink(missing_ok=True)


def publish_folder(temporary: Path, folder: Path) -> None:
    """Give a finished folder its name, over an older one; it appears whole, and survives a power cut."""
    for path in temporary.rglob("*"):
        sync(path)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.replace(folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _local_files(path: str, key: str) -> Iterator[FileEntry]:
    try:
        entries = list(os.scandir(path))
    except FileNotFoundError:  # no such folder, or it has just been removed
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _local_files(entry.path, f"{key}/{entry.name}")
            continue
        with contextlib.suppress(FileNotFoundError):
            stat = entry.stat(follow_symlinks=False)
            version = f"{stat.st_size}-{stat.st_mtime_ns}"
            yield FileEntry(f"{key}/{entry.name}", stat.st_size, stat.st_mtime, version)


def _remote_entry(key: str, info: dict[str, Any]) -> FileEntry:
    """Build the entry of a remote file: s3fs, gcsfs, adlfs and others name the time of modification differently."""
    modified = next(
        (info[name] for name in ("LastModified", "last_modified", "mtime", "created") if name in info), None
    )
    seconds = modified.timestamp() if isinstance(modified, datetime) else modified
    version = info.get("ETag") or info.get("etag") or f"{info['size']}-{seconds}"
    return FileEntry(key, int(info["size"]), seconds if isinstance(seconds, int | float) else None, str(version))


def _check_parquet(path: Path, table: pa.Table, key: str) -> None:
    with pq.ParquetFile(path) as written:
        num_rows, back = written.metadata.num_rows, written.read(use_threads=False)
    if num_rows != table.num_rows:
        raise ValueError(f"{key}: wrote {table.num_rows} rows, the file holds {num_rows}")
    if not back.schema.equals(table.schema, check_metadata=False):
        raise ValueError(f"{key}: the file's schema is not the table's:\n{back.schema}\ninstead of\n{table.schema}")
    for name in back.schema.names:
        leaf = back[name].combine_chunks()
        while pa.types.is_list(leaf.type):
            leaf = leaf.flatten()
        if pa.types.is_floating(leaf.type):
            values = leaf.drop_null().to_numpy(zero_copy_only=False)
            if not np.isfinite(values).all():
                raise ValueError(
                    f"{key}: column {name} holds {np.count_nonzero(~np.isfinite(values))} values that are not finite"
                )
