"""Find out before the first step which workers write to the same disk, since hours of training depend on it.

A checkpoint is complete when every worker's shards are in one place: the output folder if all workers see it, or the
object store of the run if each machine has its own disk. Without an object store the shards of a checkpoint would be
scattered over the machines, so the job is refused.
"""

import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from train.distributed import Workers

WAIT_SECONDS: Final = 3.0
"""Time that a file written by another machine may take to appear on a network disk."""


@dataclass(frozen=True)
class Disk:
    """One worker's view of the output folder.

    Attributes:
        is_shared: every worker sees what every other writes there.
        is_first: this worker has the lowest rank of those that see this folder; it removes what is old there.
    """

    is_shared: bool
    is_first: bool


ONE_DISK: Final = Disk(is_shared=True, is_first=True)
"""View of a single worker."""


def compare_disks(output: Path, workers: Workers, *, store: str | None, marker: str | None = None) -> Disk:
    """Find out which workers see the same output folder. All workers call this; it makes the folder.

    Args:
        output: the job's folder, by its path on this machine.
        workers: processes that train together.
        store: URL of the object store that checkpoints and the model go to; None without one.
        marker: name of a file that the process which started the workers has made in the folder on its own machine.

    Raises:
        ValueError: without a store, the folder is not one and the same for all; says which machines differ and what to set.
            Or a worker cannot write to it.
        RuntimeError: another worker cannot write to it.
    """
    token = f".seen-{workers.broadcast(uuid.uuid4().hex[:12])}"
    with workers.fail_together():  # afterwards every worker's file is there
        _write(output / f"{token}-{workers.rank}", store=store)
    try:
        lowest = next(rank for rank in range(workers.rank + 1) if appears(output / f"{token}-{rank}", waits=not rank))
        sees_marker = marker is None or appears(output / marker, waits=workers.is_first)
        views = workers.gather((lowest, sees_marker, socket.gethostname()))
    finally:
        (output / f"{token}-{workers.rank}").unlink(missing_ok=True)
    hosts = [host for _, _, host in views]
    apart = next((rank for rank, (first, _, _) in enumerate(views) if first), None)
    if store is None and apart is not None:
        raise ValueError(_refusal(f"worker {apart} on {hosts[apart]}", f"worker 0 on {hosts[0]}", output))
    if store is None and not views[0][1]:
        raise ValueError(_refusal(f"worker 0 on {hosts[0]}", "the command that started it", output))
    return Disk(is_shared=apart is None, is_first=lowest == workers.rank)


def _write(path: Path, *, store: str | None) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    except OSError as error:
        advice = (
            "give a run directory that every machine of the cluster can write"
            if store is None
            else "set engine.scratch to a folder that every machine of the cluster can write"
        )
        raise ValueError(
            f"training cannot write to {path.parent} on {socket.gethostname()} ({error.strerror}): {advice}"
        ) from error


def appears(path: Path, *, waits: bool) -> bool:
    """Return whether a file is there; where it ``waits``, or comes soon."""
    end = time.monotonic() + WAIT_SECONDS
    while not path.exists():
        if not waits or time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _refusal(who: str, whom: str, output: Path) -> str:
    return (
        f"{who} does not see what {whom} wrote to {output}: their disks are separate, so the parts of a checkpoint "
        "would be scattered over the machines. Give a run directory on a disk that all machines share "
        "(RUN=/shared/...), or one in an object store (RUN=s3://bucket/prefix)"
    )
