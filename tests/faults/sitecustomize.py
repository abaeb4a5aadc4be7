"""Fault injection for processes that the tests start: Python loads this file at start-up when it is on the path.

``PTAFUSE_FAULT`` is ``<what>:<stage>:<shard>:<folder>``. When a worker has written that shard's data and not yet its
manifest (for ``train``: when that step's checkpoint is committed), once per stage: ``die`` kills the worker; ``block``
makes it wait, so that the test can kill whom it likes.
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
    """Wraps ``ShardWorker._write``, or ``Checkpoints._commit``, right after their modules were imported."""

    def __init__(self, name, wrap):
        self.name = name
        self.wrap = wrap

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            self.wrap(module)

        spec.loader.exec_module = exec_module
        return spec


def _fault(here, number):
    """Happens once at the place and number that PTAFUSE_FAULT names."""
    what, stage, wanted, folder = os.environ["PTAFUSE_FAULT"].split(":", 3)
    if number != int(wanted) or stage not in ("*", here.split("/")[0]):
        return
    try:
        (Path(folder) / f"{what}-{here.replace('/', '-')}").touch(exist_ok=False)
    except FileExistsError:
        return
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(120)


def _wrap_worker(module):
    write = module.ShardWorker._write

    def faulty(self, number, *arguments):
        manifest = write(self, number, *arguments)
        _fault(self._job.step.key, number)
        return manifest

    module.ShardWorker._write = faulty


def _wrap_training(module):
    commit = module.Checkpoints._commit

    def faulty(self, written, folder, state):
        commit(self, written, folder, state)
        if self._workers.is_first:
            _fault("train", state.step)

    module.Checkpoints._commit = faulty


if os.environ.get("PTAFUSE_FAULT"):
    sys.meta_path[:0] = [_Patch("pipeline.worker", _wrap_worker), _Patch("train.checkpoint", _wrap_training)]
