"""The recorded attempts at shards that are not done, and which of them are running now."""

import json
import os
import socket
import time
from collections.abc import Container, Mapping
from typing import Any

from stages.contract.store import Store


def unfinished_attempts(store: Store, folder: str, done: Container[int]) -> dict[int, list[dict[str, Any]]]:
    """The recorded attempts at the shards of a step that are not done: one listing, and one read an attempt.

    Args:
        store: the run directory.
        folder: the step's folder.
        done: shards whose attempts nobody asks for any more; their manifests say how many there were.

    Returns:
        Shard -> its attempts' records, oldest first.
    """
    shards = {}
    for entry in store.files(f"{folder}/attempts"):
        name, file = entry.key.split("/")[-2:]
        shard = int(name.removeprefix("shard-"))
        if shard not in done and file.endswith(".json"):
            shards[entry.key] = shard
    found: dict[int, list[dict[str, Any]]] = {}
    for key, raw in store.read_all(list(shards)):
        found.setdefault(shards[key], []).append(json.loads(raw))
    return {shard: sorted(records, key=lambda record: record["started"]) for shard, records in sorted(found.items())}


def is_running(record: Mapping[str, Any], *, longest_seconds: float) -> bool:
    """Is an attempt at a shard that has no manifest still computing?

    Args:
        record: the attempt's.
        longest_seconds: an attempt on another machine that began longer ago is taken for dead.
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
