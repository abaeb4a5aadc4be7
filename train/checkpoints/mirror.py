"""Copies of committed checkpoints in an object store, since a machine that disappears takes its disk along.

    <url>/checkpoint-000500/__0_0.distcp ...  as on disk
                            log.jsonl         the job's log up to that step
                            COMMITTED         written last: the sha256 of all files

Every worker uploads the shards that it has written, and the first one uploads COMMITTED when all have arrived. A copy
without COMMITTED is incomplete. Older copies are removed when a newer one is complete.

Where the workers share no disk, this is the only place where a checkpoint is whole: see ``train.checkpoints.disks``.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from stages.contract.digest import file_sha256, sha256
from stages.contract.filesystem import StoreError
from stages.contract.store import Store, sync
from train.checkpoints.folders import COMMITTED, LOG, checkpoint_folder, checkpoint_step, committed_steps
from train.distributed import ALONE, Peers
from train.run_log import log_until

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_SHARD = re.compile(r"^__(\d+)_\d+\.distcp$")


@dataclass(frozen=True)
class Copy:
    """A complete checkpoint in the object store.

    Attributes:
        step: the checkpoint's.
        files: name -> sha256 of all of its files, the log's among them.
    """

    step: int
    files: Mapping[str, str]


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

    @property
    def url(self) -> str:
        """The folder in the object store."""
        return self._store.url

    def put(self, step: int, output: Path, peers: Peers = ALONE) -> bool:
        """Copy a checkpoint, COMMITTED last, then remove older copies. All peers call this.

        Args:
            step: the checkpoint's.
            output: its job's folder, with the files that this worker wrote.
            peers: workers that have written the checkpoint.

        Returns:
            Whether the copy is complete. A failure is logged: training continues.
        """
        folder = checkpoint_folder(output, step)
        try:
            self._put(step, folder, peers)
        except StoreError as error:
            if peers.is_first:
                logger.warning(
                    "%s could not be copied to %s; the next checkpoint will be copied: %s", folder, self.url, error
                )
            return False
        return True

    def _put(self, step: int, folder: Path, peers: Peers) -> None:
        def begin() -> None:
            if peers.is_first:
                self._store.delete(f"{folder.name}/{COMMITTED}")  # of an earlier copy of the same step

        def upload() -> dict[str, str]:
            return self._upload(step, folder, peers)

        # Each phase ends on all workers before the next one begins: nobody overwrites a file of a copy that still counts,
        # and nobody commits a copy of which a file has not arrived.
        _all(peers, begin)
        hashes = {name: digest for uploaded in _all(peers, upload) for name, digest in uploaded.items()}

        def commit() -> None:
            if peers.is_first:
                self._store.replace(f"{folder.name}/{COMMITTED}", json.dumps({"files": hashes}, indent=1).encode())

        _all(peers, commit)
        if peers.is_first:
            self._remove_older()

    def _upload(self, step: int, folder: Path, peers: Peers) -> dict[str, str]:
        """Upload this worker's files; name -> sha256."""
        hashes = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if (
                path.is_file()
                and name != COMMITTED
                and not name.endswith(".tmp")
                and _writer(name, peers) == peers.rank
            ):
                self._store.upload(f"{folder.name}/{name}", path)
                hashes[name] = file_sha256(path)
        if peers.is_first:
            log = log_until(folder.parent, step)
            self._store.replace(f"{folder.name}/{LOG}", log)
            hashes[LOG] = sha256(log)
        return hashes

    def _remove_older(self) -> None:
        """Remove all but the newest complete copies; where that fails they stay until the next time."""
        try:
            newest = self._committed()[-self._keep :]
            for old in self._steps():
                if old < newest[-1] and old not in newest:
                    self._remove(old)
        except OSError as error:
            logger.warning("%s: older copies of checkpoints were not removed: %s", self.url, error)

    def fetch(self, output: Path, peers: Peers = ALONE) -> int | None:
        """Bring the newest complete copy into a job's output folder, if it is newer than the checkpoints there.

        Args:
            output: the folder, which all peers see.
            peers: each brings a part of the files; all of them call this.

        Returns:
            Its step; None where there is nothing newer.

        Raises:
            StoreError: the store cannot be read.
            ValueError: a copy names a file outside its folder.
        """
        here = peers.gather(max(committed_steps(output), default=0))[0]
        for copy in self.copies(peers, above=here):
            folder = checkpoint_folder(output, copy.step)
            if peers.is_first:
                _remove_others(folder, copy)
            names = sorted(copy.files)[peers.rank :: peers.size]
            if self.bring(copy, names, output, peers):
                if peers.is_first:
                    (folder / LOG).replace(output / LOG)
                    for path in folder.rglob("*"):
                        sync(path)
                    (folder / COMMITTED).write_text(f"copied from {self.url}\n")
                    sync(folder / COMMITTED)
                    sync(folder)
                peers.gather(None)  # afterwards all see the commit mark
                return copy.step
        return None

    def copies(self, peers: Peers, *, above: int = 0) -> Iterator[Copy]:
        """Yield the complete copies, the newest first; what is damaged is skipped. All peers go on together.

        Args:
            peers: all of them get the same copies.
            above: the step after which they are wanted.

        Raises:
            StoreError: the store cannot be read.
            ValueError: a copy names a file outside its folder.
        """
        # The first worker reads and the others hear of it, so that all decide alike while copies come and go.
        steps = _all(peers, lambda: self._committed() if peers.is_first else [])[0]
        for step in sorted((step for step in steps if step > above), reverse=True):
            files, problem = _all(peers, partial(self._read_copy, step, peers))[0]
            for name in files:
                self._store.path(name)  # refuses one that would leave the folder: absolute, or with ".."
            if problem is None and LOG not in files:
                problem = f"its {COMMITTED} is damaged (it names no {LOG})"
            if problem is None:
                yield Copy(step, files)
            else:
                self._pass_over(step, problem, peers)

    def bring(self, copy: Copy, names: list[str], output: Path, peers: Peers) -> bool:
        """Bring files of a copy into a job's output folder, those that are not there. All peers call this.

        Args:
            copy: a complete copy.
            names: names of the files that this worker wants.
            output: the job's folder on this machine.
            peers: workers that read the copy.

        Returns:
            Whether every worker has its files; where a file is missing or damaged this is logged.

        Raises:
            StoreError: the store cannot be read.
        """

        def work() -> str | None:
            return next((problem for name in names if (problem := self._bring(copy, name, output)) is not None), None)

        problem = next((problem for problem in _all(peers, work) if problem is not None), None)
        if problem is not None:
            self._pass_over(copy.step, problem, peers)
        return problem is None

    def _bring(self, copy: Copy, name: str, output: Path) -> str | None:
        """Bring one file here; return what is wrong with it, or None."""
        path, digest = checkpoint_folder(output, copy.step) / name, copy.files[name]
        if path.is_file() and file_sha256(path) == digest:  # this machine wrote it
            return None
        try:
            self._store.download(f"{checkpoint_folder(Path(), copy.step)}/{name}", path)
        except FileNotFoundError:
            return f"{name} is missing"
        return None if file_sha256(path) == digest else f"{name} is not the file that was written"

    def _read_copy(self, step: int, peers: Peers) -> tuple[dict[str, str], str | None]:
        """Return the files of a copy, and what is wrong with the list of them; only the first worker reads it."""
        if not peers.is_first:
            return {}, None
        try:
            files: Any = json.loads(self._store.read(f"{checkpoint_folder(Path(), step)}/{COMMITTED}"))["files"]
        except (ValueError, KeyError, TypeError) as error:
            return {}, f"its {COMMITTED} is damaged ({error})"
        except FileNotFoundError:
            return {}, "it was removed"
        if not isinstance(files, dict):
            return {}, f"its {COMMITTED} is damaged (it names no files)"
        return files, None

    def _pass_over(self, step: int, problem: str, peers: Peers) -> None:
        if peers.is_first:
            logger.warning("%s: the copy of step %d cannot be used: %s", self.url, step, problem)

    def remove(self) -> None:
        """Remove all copies."""
        for step in self._steps():
            self._remove(step)

    def _steps(self) -> list[int]:
        """Return the steps of all copies, complete or not, ascending."""
        steps = (checkpoint_step(name) for name in self._store.names(""))
        return sorted(step for step in steps if step is not None)

    def _committed(self) -> list[int]:
        return [step for step in self._steps() if self._store.exists(f"{checkpoint_folder(Path(), step)}/{COMMITTED}")]

    def _remove(self, step: int) -> None:
        name = str(checkpoint_folder(Path(), step))
        self._store.delete(f"{name}/{COMMITTED}")  # first, so that half a removal is not taken for a checkpoint
        for entry in self._store.files(name):
            self._store.delete(entry.key)


def _all(peers: Peers, work: Callable[[], Result]) -> list[Result]:
    """Do something on every worker.

    Returns:
        What it came to, in the order of ranks.

    Raises:
        StoreError: it failed on one of them; all workers raise it, so that none continues alone.
    """
    problem: str | None = None
    answer: Any = None
    try:
        answer = work()
    except OSError as error:
        problem = str(error)
    answers = peers.gather((answer, problem))
    problems = [
        text if peers.size == 1 else f"worker {rank}: {text}"
        for rank, (_, text) in enumerate(answers)
        if text is not None
    ]
    if problems:
        raise StoreError("; ".join(problems))
    return [answer for answer, _ in answers]


def _writer(name: str, peers: Peers) -> int:
    """Return the rank of the worker that writes a file of a checkpoint: its own shards each, all else the first."""
    match = _SHARD.match(name)
    return int(match[1]) if match and peers.size > 1 else 0


def _remove_others(folder: Path, copy: Copy) -> None:
    """Remove files of an uncommitted checkpoint's folder that do not belong to the copy being fetched."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.relative_to(folder).as_posix() not in copy.files:
            path.unlink()
