"""The processes that train one model together: who they are, and what they agree on.

Training runs under a process group that is already there (Ray Train's), under one described by the environment
(``torchrun``: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or alone, as a group of one: the same code for all three.
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
class Workers:
    """One process's view of all of them.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        device: where it computes.
        mesh: the devices of all, one dimension: the model is sharded over it.
        control: a CPU group for counts, flags and messages; used by the main thread alone.
        storage: a CPU group for checkpoints, which are written by another thread while training goes on.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    control: dist.ProcessGroup
    storage: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        """This process writes what is written once: logs, commit marks, the model."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the workers, in float64."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def most(self, value: int) -> int:
        """The largest value of all workers."""
        return max(self.gather(int(value)))

    def most_of(self, value: float) -> float:
        """The largest measurement of all workers."""
        largest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.control)
        return float(largest)

    def gather(self, value: Any) -> list[Any]:
        """The value of every worker, in the order of ranks."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_first(self, value: Any) -> Any:
        """The first worker's value."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one worker does alone or on its own files: if it fails, all fail, and none waits for it.

        Raises:
            RuntimeError: another worker failed; says which and why. The one that failed raises its own error.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised below, when the others know of it
            own = error
        failures = self.gather(None if own is None else f"{type(own).__name__}: {own}")
        if own is not None:
            raise own
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise RuntimeError(f"worker {rank} failed: {failure}")

    def wait_for_all(self) -> None:
        """Return when every worker has come here."""
        dist.barrier(group=self.control)


@contextmanager
def join_workers(device: torch.device) -> Iterator[Workers]:
    """Join the workers of this job; leaves what it found as it was.

    Args:
        device: where this process computes.
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
    """How many workers there are or will be: of the group that is there, or as the environment says, else 1."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1
