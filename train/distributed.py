"""The process group of a training job, and the collectives that its workers use.

Training runs under a process group that exists already (Ray Train's), under one that the environment describes
(``torchrun``: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or as a group of one. The same code serves all three.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # exported, but not by name
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Peers:
    """Those who do one thing together, over a process group that one thread uses at a time.

    Attributes:
        rank: rank of this process, from 0.
        size: number of workers.
        group: process group for communication; None for a single worker.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None

    @property
    def is_first(self) -> bool:
        """This process does what is done once."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process, in the order of ranks."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


ALONE = Peers(rank=0, size=1, group=None)


@dataclass(frozen=True)
class Workers:
    """The group of training processes, as one of them sees it.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        device: device that this process computes on.
        mesh: one-dimensional mesh of all devices; the model is sharded over it.
        control: CPU group for counts, flags and messages; only the main thread uses it.
        storage: CPU group for checkpoints, which another thread writes while training continues.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    control: dist.ProcessGroup
    storage: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once per job: logs, commit marks, the model."""
        return self.rank == 0

    @property
    def peers(self) -> Peers:
        """All workers, for the main thread."""
        return Peers(self.rank, self.size, self.control)

    @property
    def storage_peers(self) -> Peers:
        """All workers, for the thread that writes checkpoints."""
        return Peers(self.rank, self.size, self.storage)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum each value over the workers, in float64."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def max_int(self, value: int) -> int:
        """Return the largest value of all workers."""
        return max(self.gather(int(value)))

    def max_float(self, value: float) -> float:
        """Return the largest value of all workers, in float64."""
        largest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.control)
        return float(largest)

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every worker, in the order of ranks."""
        return self.peers.gather(value)

    def broadcast(self, value: Any) -> Any:
        """Return the value that the first worker passed; what the others pass is ignored."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """Propagate an exception to all workers, so that none of them waits forever in the next collective.

        Every worker must enter and leave the block, since leaving it is a collective.

        Raises:
            RuntimeError: another worker failed; says which one and why. The worker that failed raises its own error.
        """
        caught: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised below, once the other workers know of it
            caught = error
        failures = self.gather(None if caught is None else f"{type(caught).__name__}: {caught}")
        if caught is not None:
            raise caught
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise RuntimeError(f"worker {rank} failed: {failure}")

    def wait_for_all(self) -> None:
        """Block until every worker has called this."""
        dist.barrier(group=self.control)


@contextmanager
def join_workers(device: torch.device) -> Iterator[Workers]:
    """Join the workers of this job, and leave the process group on exit if this call started it.

    Args:
        device: device of this process.
    """
    is_ours = not dist.is_initialized()
    if is_ours:
        _start_group(device)
    control, storage = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
    assert control is not None
    assert storage is not None
    size = dist.get_world_size()
    try:
        yield Workers(
            dist.get_rank(), size, device, init_device_mesh(device.type, (size,)), control=control, storage=storage
        )
    finally:
        if is_ours:
            dist.destroy_process_group()
        else:
            dist.destroy_process_group(control)
            dist.destroy_process_group(storage)


def _start_group(device: torch.device) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend)


def environment_size() -> int:
    """Return the number of workers: of the running process group, else as WORLD_SIZE announces it, else 1."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1
