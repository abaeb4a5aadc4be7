"""Where a process can be made to die or to wait while it computes a shard: the crash points of docs/faults.md.

``PTAFUSE_FAULT`` is ``<what>[@<point>]:<stage>:<shard>:<folder>``; a stage or shard of ``*`` is every one, and without
a point it is ``data``. ``die`` kills the
process, once a stage; ``block`` makes it wait, so that the test can kill whom it likes. ``<folder>`` is where a marker
tells the test that the fault happened.
"""

import os
import re
import signal
import time
from pathlib import Path
from typing import Final

POINTS: Final = ("compute", "mid-write", "data", "manifest")
"""Inputs read; temporary file written; data in place (for ``train``: that step's checkpoint); manifest published."""
BLOCK_SECONDS: Final = 120


def reach(point: str, step: str, number: int) -> None:
    """Called where a process passes a crash point: the fault happens if it is the one that is asked for."""
    asked, stage, wanted, folder = os.environ["PTAFUSE_FAULT"].split(":", 3)
    what, _, where = asked.partition("@")
    if (
        (where or "data") != point
        or wanted not in ("*", str(number))
        or stage not in ("*", step.split("/", maxsplit=1)[0])
    ):
        return
    try:
        (Path(folder) / f"{what}-{step.replace('/', '-')}").touch(exist_ok=False)
    except FileExistsError:
        return
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(BLOCK_SECONDS)


def wrap_worker(module) -> None:
    """Points ``compute`` and ``data`` of ``pipeline.engine.worker``."""
    read, write = module.ShardWorker._read_inputs, module.ShardWorker._write

    def faulty_read(self, shard):
        inputs = read(self, shard)
        reach("compute", self._job.step.key, shard)
        return inputs

    def faulty_write(self, shard, *arguments):
        manifest = write(self, shard, *arguments)
        reach("data", self._job.step.key, shard)
        return manifest

    module.ShardWorker._read_inputs, module.ShardWorker._write = faulty_read, faulty_write


def wrap_store(module) -> None:
    """Points ``mid-write`` and ``manifest`` of ``stages.contract.store``."""
    check, create = module._check_parquet, module.Store.create

    def faulty_check(path, table, key):
        _reach_by_key("mid-write", key, r"(.+)/[^/]+/data/shard-(\d+)")
        check(path, table, key)

    def faulty_create(self, key, raw):
        created = create(self, key, raw)
        _reach_by_key("manifest", key, r"(.+)/[^/]+/manifests/shard-(\d+)")
        return created

    module._check_parquet, module.Store.create = faulty_check, faulty_create


def wrap_training(module) -> None:
    """Point ``data`` of ``train.checkpoints.checkpoint``."""
    commit = module.Checkpoints._commit

    def faulty(self, written, folder, state, *arguments):
        commit(self, written, folder, state, *arguments)
        if self._workers.is_first:
            reach("data", "train", state.step)

    module.Checkpoints._commit = faulty


WRAPPED: Final = {
    "pipeline.engine.worker": wrap_worker,
    "stages.contract.store": wrap_store,
    "train.checkpoints.checkpoint": wrap_training,
}
"""Module -> what wraps it."""


def _reach_by_key(point: str, key: str, pattern: str) -> None:
    match = re.match(pattern, key)
    if match:
        reach(point, match[1], int(match[2]))
