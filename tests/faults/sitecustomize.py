"""Fault injection for processes that the tests start: Python loads this file at start-up when it is on the path.

``PTAFUSE_FAULT`` is ``<what>:<stage>:<shard>:<folder>``. When a worker has written that shard's data and not yet its
manifest, once per stage: ``die`` kills the worker; ``block`` makes it wait, so that the test can kill whom it likes.
``<folder>`` is where a marker tells the test that the fault happened. A stage of ``*`` is every stage.
"""

import importlib.abc
import importlib.util
import os
import signal
import sys
import time
from pathlib import Path


class _Patch(importlib.abc.MetaPathFinder):
    """Wraps ``ShardWorker._write`` right after ``pipeline.worker`` was imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "pipeline.worker":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            _wrap(module.ShardWorker)

        spec.loader.exec_module = exec_module
        return spec


def _wrap(worker):
    what, stage, shard, folder = os.environ["PTAFUSE_FAULT"].split(":", 3)
    write = worker._write

    def faulty(self, number, *arguments):
        manifest = write(self, number, *arguments)
        here = self._job.step.key
        if number == int(shard) and stage in ("*", here.split("/")[0]):
            marker = Path(folder) / f"{what}-{here.replace('/', '-')}"
            try:
                marker.touch(exist_ok=False)
            except FileExistsError:
                return manifest
            if what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(120)
        return manifest

    worker._write = faulty


if os.environ.get("PTAFUSE_FAULT"):
    sys.meta_path.insert(0, _Patch())
