"""Attempts at unfinished shards, and which of them are alive."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from pipeline.run.attempts import is_running, unfinished_attempts
from stages.contract.store import Store


def record(**changes: object) -> dict:
    return {
        "attempt": 1,
        "launch": "x",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.time(),
        **changes,
    }


def test_live_process_of_this_machine_is_running() -> None:
    assert is_running(record(), longest_seconds=60)
    assert not is_running(record(error="ValueError: x"), longest_seconds=60)


def test_process_that_has_ended_is_not_running() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert not is_running(record(pid=process.pid), longest_seconds=60)


def test_an_attempt_on_another_machine_counts_as_running_until_the_longest_time() -> None:
    assert is_running(record(host="elsewhere", pid=1, started=time.time() - 50), longest_seconds=60)
    assert not is_running(record(host="elsewhere", pid=1, started=time.time() - 70), longest_seconds=60)


def test_attempts_are_those_of_unfinished_shards_oldest_first(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for shard, number, started in ((0, 1, 1.0), (3, 2, 9.0), (3, 1, 5.0), (12, 1, 2.0)):
        raw = json.dumps(record(attempt=number, started=started)).encode()
        store.create(f"align/x/fp/attempts/shard-{shard:05d}/{number}-abc.json", raw)
    (tmp_path / "align/x/fp/attempts/shard-00003/.1-abc.json.0.tmp").write_text("{")
    found = unfinished_attempts(store, "align/x/fp", {0})
    assert {shard: [one["attempt"] for one in records] for shard, records in found.items()} == {3: [1, 2], 12: [1]}
    assert unfinished_attempts(store, "align/y", set()) == {}
