"""Attempts at shards: begin and record them, read those of unfinished shards, find running ones, forget failed ones."""

import json
import os
import socket
import time
import uuid
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.run.steps import ResolvedRun
from stages.contract.manifest import (
    attempts_folder,
    manifest_key,
)
from stages.contract.store import Store


def unfinished_attempts(store: Store, folder: str, done: Container[int]) -> dict[int, list[dict[str, Any]]]:
    """Read the recorded attempts at the shards of a step that are not done, with one listing and one read per attempt.

    Args:
        store: the run directory.
        folder: the step's folder.
        done: shards whose attempts are not needed any more; their manifests say how many there were.

    Returns:
        Shard -> its attempts' records, oldest first.
    """
    shards = {}
    for entry in store.files(f"{folder}/attempts"):
        name, file = entry.key.split("/")[-2:]
        shard = int(name.removeprefix("shard-"))
        if shard not in done and file.endswith(".json"):
            shards[entry.key] = shard
    attempts: dict[int, list[dict[str, Any]]] = {}
    for key, raw in store.read_all(list(shards)):
        attempts.setdefault(shards[key], []).append(json.loads(raw))
    return {shard: sorted(records, key=lambda record: record["started"]) for shard, records in sorted(attempts.items())}


def is_running(record: Mapping[str, Any], *, longest_seconds: float) -> bool:
    """Return whether an attempt at a shard without a manifest is still computing.

    Args:
        record: record of the attempt.
        longest_seconds: an attempt on another machine that began longer ago counts as dead.
    """
    if record.get("error"):
        return False
    if time.time() - record["started"] > longest_seconds:
        return False
    return record["host"] != socket.gethostname() or _is_alive(record["pid"])


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


@dataclass(frozen=True)
class Attempt:
    """Attempt at a shard, with its record on disk."""

    key: str
    name: str
    number: int
    record: Mapping[str, Any]

    @classmethod
    def begin(cls, store: Store, folder: str, shard: int, launch: str, max_attempts: int) -> "Attempt | str":
        """Record that an attempt starts.

        Attempts that ended in an error count against the shard forever; those that just ended (a killed worker) count
        only within the command that started them: a new command, after a preemption, does not count them.

        Returns:
            The attempt, or the reason why the shard gets no further attempt.
        """
        past = read_attempts(store, folder, shard)
        counted = [record for record in past if record.get("error") or record["launch"] == launch]
        if len(counted) >= max_attempts:
            errors = [record["error"] for record in counted if record.get("error")]
            return errors[-1] if errors else "the worker died in every attempt (out of memory, or killed)"
        number = len(past) + 1
        name = f"{number}-{uuid.uuid4().hex[:8]}"
        key = f"{attempts_folder(folder, shard)}/{name}.json"
        record = {
            "attempt": number,
            "launch": launch,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.time(),
        }
        store.create(key, json.dumps(record).encode())
        return cls(key, name, number, record)

    def fail(self, store: Store, error: Exception) -> None:
        """Record how the attempt ended."""
        store.replace(self.key, json.dumps({**self.record, "error": f"{type(error).__name__}: {error}"}).encode())


def read_attempts(store: Store, folder: str, shard: int) -> list[dict[str, Any]]:
    """Read the recorded attempts at a shard, oldest first."""
    where = attempts_folder(folder, shard)
    records = [json.loads(store.read(f"{where}/{name}")) for name in store.names(where) if name.endswith(".json")]
    return sorted(records, key=lambda record: record["started"])


def forget_failures(resolved: ResolvedRun, store: Store) -> int:
    """Remove the recorded attempts of shards that failed and are not done.

    Returns:
        How many shards that were.
    """
    count = 0
    for step in resolved.steps.values():
        for name in store.names(f"{step.folder}/attempts"):
            shard = int(name.removeprefix("shard-"))
            failed = any(record.get("error") for record in read_attempts(store, step.folder, shard))
            if failed and not store.exists(manifest_key(step.folder, shard)):
                where = attempts_folder(step.folder, shard)
                for file in store.names(where):
                    store.delete(f"{where}/{file}")
                count += 1
    return count
