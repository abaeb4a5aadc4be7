"""Figures of done shards, rolled up so that ten thousand shards are read as a few files.

    <step>/rollups/<name>.jsonl     one line per shard: figures from its manifest, under the manifest's name and version

A rollup proves nothing: a shard is done if its manifest is in the listing, and a line counts only while the listing shows
the manifest in the version that the line was made from. Other manifests are read themselves. So rollups may be lost,
late, double or out of date, and cost only time. The driver writes them as shards come in.
"""

import json
import logging
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from stages.contract.manifest import HealthMetric, Manifest, Mean
from stages.contract.store import FileEntry, Store

log = logging.getLogger(__name__)

ROLLUP_VERSION = 1
"""Rollups of another version are not read."""
SHARDS_PER_ROLLUP = 1000
"""Number of newly finished shards after which the driver writes a rollup."""
MIN_SHARDS_TO_ROLL_UP = 100
"""Reading fewer manifests than this takes no longer than reading a rollup of them."""
MAX_ROLLUPS_PER_STEP = 64
"""A step with more rollups (a run that was restarted often) has them merged into one."""


@dataclass(frozen=True, slots=True)
class DoneShard:
    """Summary of one manifest.

    Attributes:
        shard: its number.
        num_rows: rows in the data file.
        num_quarantined: records in quarantine.
        num_tokens: tokens processed.
        num_bytes: size of the data file.
        seconds: time of reading, computing and writing.
        cpus: CPUs of its worker; None in a manifest of a version that did not record them.
        gpus: GPUs of its worker; None as for ``cpus``.
        attempt: number of the attempt, from 1.
        sha256: hash of the data file.
        data_key: key of the data file.
        finished: time at which the manifest was published, in seconds since the epoch; None if the filesystem does not
            record it.
    """

    shard: int
    num_rows: int
    num_quarantined: int
    num_tokens: int
    num_bytes: int
    seconds: float
    cpus: float | None
    gpus: float | None
    attempt: int
    sha256: str
    data_key: str
    finished: float | None


@dataclass(frozen=True)
class Line:
    """One line of a rollup.

    Attributes:
        version: version of the manifest file, as the listing shows it.
        figures: figures of the shard.
        health: the stage's health metrics: a number that adds up, or [total, count] of a mean.
    """

    version: str
    figures: DoneShard
    health: Mapping[str, float | list[float]]


@dataclass
class StepFigures:
    """Done shards of one step.

    Attributes:
        shards: shard -> its figures.
        health: health metrics, added up over them.
    """

    shards: dict[int, DoneShard] = field(default_factory=dict)
    health: dict[str, HealthMetric] = field(default_factory=dict)


class FiguresReader:
    """Reader of the figures of done shards, of any step, that reads each of them only once."""

    def __init__(self, store: Store) -> None:
        """Remember the store; nothing is read yet."""
        self._store = store
        self._seen: dict[str, tuple[dict[str, str], StepFigures]] = {}

    def read(self, folder: str) -> StepFigures:
        """Return the done shards of the step in ``folder``."""
        entries = manifest_entries(self._store, folder)
        listed = {key: entry.version for key, entry in entries.items()}
        seen, figures = self._seen.get(folder, ({}, StepFigures()))
        if any(listed.get(key) != version for key, version in seen.items()):  # a shard was removed or recomputed
            seen, figures = {}, StepFigures()
        new = {key: entry for key, entry in entries.items() if key not in seen}
        if new:
            lines = {} if seen else read_rollups(self._store, folder)
            lines = {key: line for key, line in lines.items() if listed.get(key) == line.version}
            lines |= read_lines(self._store, [entry for key, entry in new.items() if key not in lines])
            figures = _added(figures, lines.values())
            listed = {key: listed[key] for key in (*seen, *lines)}
        self._seen[folder] = (listed, figures)
        return figures


def manifest_entries(store: Store, folder: str) -> dict[str, FileEntry]:
    """List the manifest files of a step, by key."""
    return {entry.key: entry for entry in store.files(f"{folder}/manifests") if is_manifest(entry.key)}


def is_manifest(key: str) -> bool:
    """Return whether this is the key of a manifest file. A killed process may leave other files in the same folder."""
    *_, folder, name = ("", *key.split("/"))
    return folder == "manifests" and name.startswith("shard-") and name.endswith(".json")


def read_lines(store: Store, entries: Sequence[FileEntry]) -> dict[str, Line]:
    """Read manifests and return the lines that a rollup would hold for them, by key."""
    by_key = {entry.key: entry for entry in entries}
    return {key: line_of(by_key[key], Manifest.from_bytes(raw)) for key, raw in store.read_all(list(by_key))}


def line_of(entry: FileEntry, manifest: Manifest) -> Line:
    """Return the line that a rollup holds for one manifest."""
    figures = DoneShard(
        shard=manifest.shard,
        num_rows=manifest.num_rows_out,
        num_quarantined=manifest.num_quarantined,
        num_tokens=manifest.num_tokens,
        num_bytes=manifest.data.num_bytes,
        seconds=manifest.seconds,
        cpus=manifest.cpus,
        gpus=manifest.gpus,
        attempt=manifest.attempt,
        sha256=manifest.data.sha256,
        data_key=manifest.data.key,
        finished=entry.modified,
    )
    health = {
        name: [figure.total, figure.count] if isinstance(figure, Mean) else figure
        for name, figure in manifest.health.items()
    }
    return Line(entry.version, figures, health)


def read_rollups(store: Store, folder: str) -> dict[str, Line]:
    """Read all lines of a step's rollups, by the manifest's key."""
    keys = [entry.key for entry in store.files(f"{folder}/rollups") if entry.key.endswith(".jsonl")]
    lines = {}
    for _, raw in store.read_all(keys):
        for text in raw.splitlines():
            value = json.loads(text)
            if value["rollup_version"] == ROLLUP_VERSION:
                lines[value["manifest"]] = Line(value["version"], DoneShard(**value["figures"]), value["health"])
    return lines


def write_rollup(store: Store, folder: str, lines: Mapping[str, Line]) -> None:
    """Write one rollup.

    Args:
        store: the run directory.
        folder: folder of the step.
        lines: manifest key -> line.
    """
    values = (
        {
            "rollup_version": ROLLUP_VERSION,
            "manifest": key,
            "version": line.version,
            "figures": {name: getattr(line.figures, name) for name in DoneShard.__slots__},
            "health": dict(line.health),
        }
        for key, line in lines.items()
    )
    raw = "".join(json.dumps(value) + "\n" for value in values)
    store.replace(f"{folder}/rollups/{len(lines):05d}-{uuid.uuid4().hex[:8]}.jsonl", raw.encode())


def roll_up(store: Store, folder: str) -> None:
    """Write a rollup of the manifests that are in no rollup yet, if there are enough of them.

    An error of the store is only logged: a run does not fail because a shortcut could not be written.
    """
    try:
        entries = manifest_entries(store, folder)
        if len(entries) < MIN_SHARDS_TO_ROLL_UP:
            return
        lines = {key: line for key, line in read_rollups(store, folder).items() if key in entries}
        new = [entry for key, entry in entries.items() if key not in lines or lines[key].version != entry.version]
        if len(new) < MIN_SHARDS_TO_ROLL_UP:
            return
        old = [entry.key for entry in store.files(f"{folder}/rollups")]
        read = read_lines(store, new)
        if len(old) < MAX_ROLLUPS_PER_STEP:
            write_rollup(store, folder, read)
            return
        write_rollup(store, folder, lines | read)
        for key in old:
            store.delete(key)
    except OSError as error:
        log.warning("%s: no rollup was written, so `ptafuse status` will be slower: %s", folder, error)


def _added(before: StepFigures, lines: Iterable[Line]) -> StepFigures:
    """Add lines to the figures, as plain numbers: one object per number would take most of the time."""
    shards = dict(before.shards)
    counts = {name: figure for name, figure in before.health.items() if not isinstance(figure, Mean)}
    means = {name: [mean.total, mean.count] for name, mean in before.health.items() if isinstance(mean, Mean)}
    for line in lines:
        shards[line.figures.shard] = line.figures
        for name, figure in line.health.items():
            if isinstance(figure, list):
                sums = means.setdefault(name, [0.0, 0])
                sums[0] += figure[0]
                sums[1] += figure[1]
            else:
                counts[name] = counts.get(name, 0) + figure
    health: dict[str, HealthMetric] = {**counts}
    health |= {name: Mean(total=total, count=int(count)) for name, (total, count) in means.items()}
    return StepFigures(dict(sorted(shards.items())), health)
