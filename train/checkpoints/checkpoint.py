"""Checkpoints of a training run: torch.distributed.checkpoint, sharded, written by a thread while training continues.

    <output>/checkpoint-000500/__0_0.distcp ...  every worker's shards: weights and AdamW's state, float32
                               .metadata         which tensor is where
                               state.json        position of the run
                               COMMITTED         written last, by the first worker, when every worker's shards are on disk

A folder without COMMITTED is incomplete and is removed when the job starts again. A checkpoint can be read by a different
number of workers than wrote it. It takes 12 bytes per trained parameter; frozen parameters are left out.

If each machine has its own disk (``train.checkpoints.disks``), such a folder holds only the shards of that machine's
workers and never a COMMITTED: the checkpoint is complete in the object store, and the folder saves its machine a part
of the download.
"""

import json
import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor

from stages.contract.store import sync
from stages.contract.tracebacks import shows_tracebacks
from train.checkpoints.disks import ONE_DISK, Disk
from train.checkpoints.folders import (
    COMMITTED,
    LOG,
    checkpoint_folder,
    committed_steps,
    remove_checkpoints,
    remove_old_checkpoints,
    remove_torn_checkpoints,
)
from train.checkpoints.mirror import CheckpointMirror
from train.checkpoints.reader import CheckpointReader
from train.distributed import Workers

logger = logging.getLogger(__name__)

STATE = "state.json"
METADATA = ".metadata"


@dataclass(frozen=True)
class TrainState:
    """Position of a run after an optimizer step.

    Attributes:
        fingerprint: fingerprint of the job.
        dataset: sha256 over the fused files' hashes.
        seed: seed of the blocks' order.
        num_blocks: number of blocks in the dataset.
        step: optimizer steps done.
        epoch: epoch of the next block.
        next_sample: blocks trained on so far, all epochs together: index of the next one in the global order.
        num_tokens: tokens trained on so far.
    """

    fingerprint: str
    dataset: str
    seed: int
    num_blocks: int
    step: int
    epoch: int
    next_sample: int
    num_tokens: int


class Checkpoints:
    """Checkpoints of a sharded model and its optimizer; leaving the context waits for the one being written.

    Attributes:
        safe_step: the newest step from which training can resume, of those that were saved or restored here.
    """

    def __init__(
        self,
        output: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        workers: Workers,
        *,
        keep: int,
        copies: CheckpointMirror | None = None,
        disk: Disk = ONE_DISK,
    ) -> None:
        """Prepare to read and write checkpoints. All workers do so.

        Args:
            output: the run's folder.
            model: sharded.
            optimizer: optimizer of the model's parameters.
            workers: processes that share the model.
            keep: newest checkpoints that stay on disk.
            copies: copies in an object store; needed if the workers share no disk.
            disk: this worker's view of the folder: which workers share it.
        """
        self._output = output
        self._model = model
        self._optimizer = optimizer
        self._workers = workers
        self._keep = keep
        self._copies = copies
        self._disk = disk
        self.safe_step: int | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ptafuse-checkpoint")
        self._pending: Future[None] | None = None

    def restore(self, expected: TrainState) -> TrainState:
        """Load the newest committed checkpoint, if there is one.

        Args:
            expected: the job's state before its first step; fingerprint, dataset, seed and number of blocks must agree.

        Returns:
            The checkpoint's state; ``expected`` when there is no committed checkpoint.

        Raises:
            ValueError: the checkpoint belongs to another job, or its tensors do not fit the model.
        """
        restored = self._restore_shared(expected) if self._disk.is_shared else self._restore_scattered(expected)
        if restored is None:
            return expected
        self.safe_step = restored.step
        return restored

    def _restore_shared(self, expected: TrainState) -> TrainState | None:
        """Restore from the folder that all workers see, after a newer copy was brought there."""
        if self._copies is not None:
            self._copies.fetch(self._output, self._workers.peers)
        if self._workers.is_first:
            remove_torn_checkpoints(self._output)
        step = self._workers.broadcast(max(committed_steps(self._output), default=None))
        if step is None:
            return None
        folder = checkpoint_folder(self._output, step)
        state = _read_state(folder, expected)
        tensors, groups = self._tensors()
        _check_tensors(tensors, folder)
        self._load(tensors, groups, folder)
        return state

    def _restore_scattered(self, expected: TrainState) -> TrainState | None:
        """Restore from the object store; each worker brings the files that hold its shards to its machine's disk."""
        copies, peers = self._copies, self._workers.peers
        assert copies is not None, "checkpoints need a shared disk or an object store"
        for copy in copies.copies(peers):
            folder = checkpoint_folder(self._output, copy.step)
            small = [STATE, METADATA, *([LOG] if peers.is_first else [])]
            if not copies.bring(copy, small, self._output, peers):
                continue
            with self._workers.fail_together():
                state = _read_state(folder, expected)
                tensors, groups = self._tensors()
                _check_tensors(tensors, folder)
                needed = _needed_files(tensors, folder)
            if not copies.bring(copy, needed, self._output, peers):
                continue
            self._load(tensors, groups, folder)
            if peers.is_first:
                (folder / LOG).replace(self._output / LOG)
            if self._disk.is_first:
                remove_checkpoints(self._output, but=copy.step)
            return state
        return None

    def _load(self, tensors: dict[str, dict[str, Any]], groups: list[dict[str, Any]], folder: Path) -> None:
        # The live tensors are filled in place, so a checkpoint never needs the memory of a second model.
        load(tensors, storage_reader=CheckpointReader(folder), process_group=self._workers.storage)
        set_optimizer_state_dict(self._model, self._optimizer, {"state": tensors["optimizer"], "param_groups": groups})

    def save(self, state: TrainState) -> None:
        """Begin to write a checkpoint.

        Returns when the tensors are copied; a thread commits the checkpoint when all workers' files are on disk.

        Raises:
            OSError: the disk has no room for it, or the checkpoint before this one could not be written; torch may raise its
                own errors for that.
        """
        self.wait()  # one checkpoint at a time: two would hold two copies of the tensors
        folder = checkpoint_folder(self._output, state.step)
        if self._disk.is_first and folder.exists():
            shutil.rmtree(folder)  # left over from the same step of the same job
        self._workers.wait_for_all()  # no worker may write before the old folder is gone
        tensors, _ = self._tensors()
        num_bytes = _local_bytes(tensors)
        with self._workers.fail_together():
            _require_space(folder, num_bytes)
        written = async_save(tensors, checkpoint_id=folder, process_group=self._workers.storage)
        self._pending = self._thread.submit(self._commit, cast(Future, written), folder, state, num_bytes)

    def wait(self) -> None:
        """Block until no checkpoint is being written.

        Raises:
            OSError: the last one could not be written; torch may raise its own errors for it.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _commit(self, written: Future, folder: Path, state: TrainState, num_bytes: int) -> None:
        try:
            written.result()  # returns when every worker has written its shards
        except Exception:
            _require_space(folder, num_bytes)  # torch reports a disk that became full as an error of its file format
            raise
        if self._workers.is_first:
            # Each file reaches the disk before the next one is written, so that COMMITTED never precedes what it vouches for.
            (folder / STATE).write_text(json.dumps(asdict(state), indent=1) + "\n")
            sync(folder / STATE)
            sync(folder)
            if self._disk.is_shared:
                (folder / COMMITTED).write_text(f"{state.fingerprint}\n")
                sync(folder / COMMITTED)
                sync(folder)
                sync(self._output)
                remove_old_checkpoints(self._output, keep=self._keep)
        is_copied = self._copies is not None and self._copies.put(state.step, self._output, self._workers.storage_peers)
        if self._disk.is_shared or is_copied:
            self.safe_step = state.step
        if not self._disk.is_shared and self._disk.is_first:
            remove_checkpoints(self._output, but=state.step)

    def _tensors(self) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
        """Return the tensors of a checkpoint, as views of the live ones, and the optimizer's groups.

        A tied parameter is included once. Frozen parameters are left out: their values come with the loaded model.
        """
        weights, optimizer = get_state_dict(self._model, self._optimizer)
        changing = {name for name, parameter in self._model.named_parameters() if parameter.requires_grad}
        changing |= {name for name, _ in self._model.named_buffers()}
        weights = {name: value for name, value in weights.items() if name in changing}
        return {"model": weights, "optimizer": cast(dict, optimizer["state"])}, cast(list, optimizer["param_groups"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception as lost:
            if error is None:
                raise
            logger.warning(
                "the checkpoint that was being written is lost (%s); older ones are intact",
                lost,
                exc_info=lost if shows_tracebacks() else None,
            )
        finally:
            self._thread.shutdown()


def _local_bytes(tensors: dict[str, dict[str, Any]]) -> int:
    """Return the size of what this worker writes of a checkpoint."""
    fields = [value for state in tensors["optimizer"].values() for value in state.values()]
    values = [value for value in (*tensors["model"].values(), *fields) if isinstance(value, torch.Tensor)]
    return sum((value.to_local() if isinstance(value, DTensor) else value).nbytes for value in values)


def _require_space(folder: Path, num_bytes: int) -> None:
    """Refuse to write a checkpoint that does not fit on the disk.

    Raises:
        OSError: says how much is missing, and what to do.
    """
    free = shutil.disk_usage(folder.parent).free
    if free < num_bytes:
        raise OSError(
            f"{folder} cannot be written: a checkpoint takes {num_bytes / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB "
            "left. Free some space (`ptafuse gc` removes what no manifest names; train.keep_checkpoints = 1 keeps one), then "
            "run the same command: it continues from the newest checkpoint"
        )


def _read_state(folder: Path, expected: TrainState) -> TrainState:
    """Read the state of a checkpoint.

    Raises:
        ValueError: it belongs to another job.
    """
    state = TrainState(**json.loads((folder / STATE).read_text()))
    for name in ("fingerprint", "dataset", "seed", "num_blocks"):
        actual, wanted = getattr(state, name), getattr(expected, name)
        if actual != wanted:
            raise ValueError(
                f"{folder} belongs to another job: its {name} is {actual!r}, this job's is {wanted!r}. Train in another "
                f"output folder, or remove {folder.parent}"
            )
    return state


def _needed_files(tensors: dict[str, dict[str, Any]], folder: Path) -> list[str]:
    """Return the names of the files of a checkpoint that hold what these tensors' local shards are read from."""
    metadata = CheckpointReader(folder).read_metadata()
    planner = DefaultLoadPlanner()
    planner.set_up_planner(tensors, metadata, is_coordinator=False)
    places = metadata.storage_data
    return sorted({places[item.storage_index].relative_path for item in planner.create_local_plan().items})


def _check_tensors(tensors: dict[str, dict[str, Any]], folder: Path) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        ValueError: says which tensor is missing, or of another shape.
    """
    wanted = {f"model.{name}": value.shape for name, value in tensors["model"].items()}
    for name, fields in tensors["optimizer"].items():
        wanted |= {f"optimizer.{name}.{field}": value.shape for field, value in fields.items()}
    saved = {
        name: entry.size
        for name, entry in CheckpointReader(folder).read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    if wanted.keys() != saved.keys():
        differing = sorted(wanted.keys() ^ saved.keys())
        raise ValueError(f"{folder} does not fit the model: {len(differing)} tensors differ, first {differing[0]}")
    for name, shape in wanted.items():
        if shape != saved[name]:
            raise ValueError(f"{folder}: {name} has shape {tuple(saved[name])}, expected {tuple(shape)}")
