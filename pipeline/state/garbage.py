"""``ptafuse gc``: remove what killed and overtaken attempts left in a run directory, and nothing else.

Garbage is a data or quarantine file that no manifest names, a temporary file of an interrupted write, and a token table or a
map that this version would make again; all by the exact names that this program gives them, and older than a day. All else
stays: files of others, attempts' records, plans, configurations, rollups, everything of train and eval (the next `make
train` removes what an interrupted checkpoint left), and what a running attempt has written.
"""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from pipeline.display.durations import DAY_SECONDS, format_duration
from pipeline.run.attempts import is_running
from pipeline.run.rollup import is_manifest
from pipeline.run.stage_table import SHARDED_STAGES
from stages.contract.manifest import Manifest, attempts_folder, manifest_key
from stages.contract.store import FileEntry, Store
from stages.models.token_tables import FOLDER as TOKENIZERS
from stages.models.token_tables import DamagedTableError, check_file, is_of_this_version, is_table_file

FOLDERS = (*(spec.name for spec in SHARDED_STAGES), "interpret", "configs", TOKENIZERS)
"""Folders that attempts and token tables are written to, without ``train`` and ``eval``."""

_STAGES = "|".join(spec.name if spec.names is None else f"{spec.name}/[^/]+" for spec in SHARDED_STAGES)
_STEP = rf"(?P<folder>(?:{_STAGES})/[0-9a-f]{{12}})"
_OUTPUT = re.compile(
    rf"{_STEP}/(?:data/\.?shard-(?P<shard>\d{{5,}})-of-\d{{5,}}|quarantine/\.?shard-(?P<bad>\d{{5,}}))"
    r"\.(?P<attempt>\d+-[0-9a-f]{8})\.parquet(?:\.[0-9a-f]{8}\.tmp)?"
)
"""A file that an attempt wrote for a shard, under its final or its temporary name."""
_TEMPORARY = re.compile(r"(?:.*/)?\.[^/]+\.[0-9a-f]{8}\.tmp")


@dataclass(frozen=True)
class Garbage:
    """Result of ``find_garbage``.

    Attributes:
        files: may be removed.
        kept: would be removed, but they are too young, of unknown age, or of a running attempt.
    """

    files: tuple[FileEntry, ...]
    kept: tuple[FileEntry, ...]


def collect_garbage(store: Store, console: Console, *, older_than_seconds: float, dry_run: bool) -> Garbage:
    """Find the garbage of a run directory, show it, and remove it.

    Args:
        store: the run directory.
        console: console to list the files on.
        older_than_seconds: younger files stay.
        dry_run: remove nothing.

    Raises:
        ValueError: a manifest cannot be read, so what it names is unknown. Nothing was removed.
    """
    garbage = find_garbage(store, older_than_seconds=older_than_seconds)
    for entry in garbage.files:
        if not dry_run:
            store.delete(entry.key)
        console.print(
            f"{'would remove' if dry_run else 'removed'} {entry.key} ({entry.num_bytes:,} bytes)", soft_wrap=True
        )
    num_bytes = sum(entry.num_bytes for entry in garbage.files)
    console.print(
        f"{len(garbage.files):,} files, {num_bytes:,} bytes {'would be ' if dry_run else ''}removed", soft_wrap=True
    )
    if garbage.kept:
        console.print(
            f"{len(garbage.kept):,} files that no manifest names stay: younger than {format_duration(older_than_seconds)}, "
            "or of a running attempt",
            soft_wrap=True,
        )
    return garbage


def find_garbage(store: Store, *, older_than_seconds: float) -> Garbage:
    """Find what may be removed from a run directory; see the module's text.

    A manifest may be published after the listing, so those of the shards that are left are read once more.

    Raises:
        ValueError: a manifest cannot be read.
    """
    entries = [entry for folder in FOLDERS for entry in store.files(folder)]
    named = _named_files(store, [entry.key for entry in entries if is_manifest(entry.key)])
    now = time.time()
    files: list[FileEntry] = []
    kept: list[FileEntry] = []
    unnamed = _unnamed(entries, named)
    named |= _named_files(store, sorted(filter(None, (_manifest_of(entry.key) for entry in unnamed))))
    for entry in (*_unnamed(unnamed, named), *_outdated_tables(store, entries)):
        is_old = entry.modified is not None and now - entry.modified > older_than_seconds
        (files if is_old and not _is_being_written(store, entry.key) else kept).append(entry)
    return Garbage(tuple(files), tuple(kept))


def _outdated_tables(store: Store, entries: Sequence[FileEntry]) -> list[FileEntry]:
    """Find token tables and maps that are damaged, or of another version."""
    tables = {entry.key: entry for entry in entries if is_table_file(entry.key)}
    outdated = []
    for key, raw in store.read_all(list(tables)):
        try:
            check_file(key, raw)
            is_wanted = is_of_this_version(key, raw)
        except DamagedTableError:
            is_wanted = False
        if not is_wanted:
            outdated.append(tables[key])
    return outdated


def _unnamed(entries: Sequence[FileEntry], named: set[str]) -> list[FileEntry]:
    ours = (entry for entry in entries if _OUTPUT.fullmatch(entry.key) or _TEMPORARY.fullmatch(entry.key))
    return [entry for entry in ours if entry.key not in named]


def _manifest_of(key: str) -> str | None:
    """Return the manifest that would name the file; None if none ever would."""
    match = _OUTPUT.fullmatch(key)
    return match and manifest_key(match["folder"], int(match["shard"] or match["bad"]))


def _named_files(store: Store, manifests: Sequence[str]) -> set[str]:
    """Collect the keys that manifests name, over all configurations, since they share folders."""
    named = set()
    for key, raw in store.read_all(manifests):
        try:
            manifest = Manifest.from_bytes(raw)
            files = [file for file in (manifest.data, manifest.quarantine) if file is not None]
            for file in files:
                store.home_of(file)  # refuses one that no configuration names
        except ValueError as error:
            raise ValueError(
                f"{store.url}: {key} is not a manifest that this version of ptafuse can read, so the files that it "
                f"names are unknown and nothing was removed: {error}\nRun `ptafuse verify {store.url}`."
            ) from error
        named |= {file.key for file in files}
    return named


def _is_being_written(store: Store, key: str) -> bool:
    """Return whether the attempt that owns this file is still computing. An attempt without a record is not."""
    match = _OUTPUT.fullmatch(key)
    if match is None:
        return False
    shard = int(match["shard"] or match["bad"])
    try:
        record = json.loads(store.read(f"{attempts_folder(match['folder'], shard)}/{match['attempt']}.json"))
    except FileNotFoundError:
        return False
    return is_running(record, longest_seconds=DAY_SECONDS)
