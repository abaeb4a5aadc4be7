"""Copies of committed checkpoints in an object store, since a machine that disappears takes its disk along.

    <url>/checkpoint-000500/__0_0.distcp ...  as on disk
                            log.jsonl         the job's log up to that step
                            COMMITTED         written last: the sha256 of all files

A copy without COMMITTED is incomplete. Older copies are removed when a newer one is complete.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from stages.contract.digest import file_sha256, sha256
from stages.contract.store import Store, sync
from train.checkpoints.checkpoint import COMMITTED, checkpoint_folder, checkpoint_step, committed_steps
from train.run_log import log_until

logger = logging.getLogger(__name__)

_LOG = "log.jsonl"


class CheckpointMirror:
    """Copies of one job's checkpoints in an object store."""

    def __init__(self, url: str, *, keep: int) -> None:
        """Remember the folder; nothing is read or written yet.

        Args:
            url: a folder in an object store.
            keep: newest copies that stay.
        """
        self._store = Store(url)
        self._keep = keep

    def put(self, step: int, output: Path) -> None:
        """Copy a committed checkpoint, COMMITTED last, then remove older copies.

        A failure is logged, and training goes on.

        Args:
            step: the checkpoint's.
            output: its job's folder.
        """
        folder = checkpoint_folder(output, step)
        try:
            self._put(step, folder)
        except OSError as error:
            logger.warning(
                "%s is not copied to %s, the next checkpoint will be tried: %s", folder, self._store.url, error
            )

    def fetch(self, output: Path) -> int | None:
        """Bring the newest complete copy into a job's output folder, if it is newer than the checkpoints there.

        Returns:
            Its step; None where there is nothing newer.
        """
        here = max(committed_steps(output), default=0)
        for step in reversed(self._committed()):
            if step <= here:
                break
            problem = self._fetch(step, output)
            if problem is None:
                return step
            logger.warning("%s: the copy of step %d cannot be used: %s", self._store.url, step, problem)
        return None

    def remove(self) -> None:
        """Remove all copies."""
        for step in self._steps():
            self._remove(step)

    def _put(self, step: int, folder: Path) -> None:
        self._store.delete(f"{folder.name}/{COMMITTED}")  # of an earlier copy of the same step
        hashes = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name != COMMITTED:
                self._store.upload(f"{folder.name}/{name}", path)
                hashes[name] = file_sha256(path)
        log = log_until(folder.parent, step)
        self._store.replace(f"{folder.name}/{_LOG}", log)
        hashes[_LOG] = sha256(log)
        self._store.replace(f"{folder.name}/{COMMITTED}", json.dumps({"files": hashes}, indent=1).encode())
        newest = self._committed()[-self._keep :]
        for old in self._steps():
            if old < newest[-1] and old not in newest:
                self._remove(old)

    def _fetch(self, step: int, output: Path) -> str | None:
        """Download a copy; return what is wrong with it, or None if it is complete."""
        folder = checkpoint_folder(output, step)
        if folder.exists():
            shutil.rmtree(folder)  # not committed
        try:
            hashes: Any = json.loads(self._store.read(f"{folder.name}/{COMMITTED}"))["files"]
        except (ValueError, KeyError, TypeError) as error:
            return f"its {COMMITTED} is damaged ({error})"
        if not isinstance(hashes, dict):
            return f"its {COMMITTED} is damaged (it names no files)"
        for name, digest in hashes.items():
            self._store.path(name)  # refuses one that would leave the folder: absolute, or with ".."
            try:
                self._store.download(f"{folder.name}/{name}", folder / name)
            except FileNotFoundError:
                return f"{name} is missing"
            if file_sha256(folder / name) != digest:
                return f"{name} is not the file that was written"
        if _LOG not in hashes:
            return f"its {COMMITTED} is damaged (it names no {_LOG})"
        (folder / _LOG).replace(output / _LOG)
        for path in folder.rglob("*"):
            sync(path)
        (folder / COMMITTED).write_text(f"copied from {self._store.url}\n")
        sync(folder / COMMITTED)
        sync(folder)
        return None

    def _steps(self) -> list[int]:
        """Return the steps of all copies, complete or not, ascending."""
        found = (checkpoint_step(name) for name in self._store.names(""))
        return sorted(step for step in found if step is not None)

    def _committed(self) -> list[int]:
        return [step for step in self._steps() if self._store.exists(f"{checkpoint_folder(Path(), step)}/{COMMITTED}")]

    def _remove(self, step: int) -> None:
        name = str(checkpoint_folder(Path(), step))
        self._store.delete(f"{name}/{COMMITTED}")  # first, so that half a removal is not taken for a checkpoint
        for entry in self._store.files(name):
            self._store.delete(entry.key)
