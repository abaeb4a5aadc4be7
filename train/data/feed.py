"""Batches of one worker, read and collated by a thread ahead of the training step.

The order of blocks is the schedule's, whatever the number of workers: a step's blocks are cut into as many consecutive
slices as there are workers. Every worker makes the same number of forward passes in a step, since each is a collective
operation: a worker whose slice of an epoch's last, smaller step holds fewer blocks fills up with passes that count
nothing.
"""

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch

from train.data.blocks import Block, FusedBlocks, MicroBatch, collate
from train.data.schedule import Schedule
from train.distributed import Workers
from train.objective.loss import IGNORED

AHEAD = 2
"""Number of steps that are read ahead; a step of 32 blocks of 2,048 tokens with ten candidates each holds about 12 MB."""


@dataclass(frozen=True)
class StepBatch:
    """Share of one worker in one optimizer step.

    Attributes:
        step: number of the step, from 0.
        blocks: indices of the whole step's blocks, all workers together, in the schedule's order.
        names: names of this worker's blocks, by micro-batch; empty for a micro-batch that counts nothing.
        micro_batches: this worker's; their number is the same for all workers.
        num_labels: labelled positions of this worker's blocks.
        num_fused: positions with a fused distribution.
        num_tokens: tokens without padding.
    """

    step: int
    blocks: tuple[int, ...]
    names: tuple[tuple[str, ...], ...]
    micro_batches: tuple[MicroBatch, ...]
    num_labels: int
    num_fused: int
    num_tokens: int


class Feed:
    """Batches of all steps, in order, from a given step on."""

    def __init__(
        self,
        blocks: FusedBlocks,
        schedule: Schedule,
        start: int,
        workers: Workers,
        micro_batch_size: int,
        *,
        flatten: bool = False,
    ) -> None:
        """Begin to read.

        Args:
            blocks: training blocks; from now on only the feed's thread may read them.
            schedule: blocks of each step.
            start: the first step.
            workers: processes that share each step.
            micro_batch_size: blocks in a forward pass.
            flatten: lay isolated documents end to end in one row (``isolation.wants_one_row``).
        """
        self._blocks = blocks
        self._schedule = schedule
        self._rank = workers.rank
        self._size = workers.size
        self._pins = workers.device.type == "cuda"
        self._micro_batch_size = micro_batch_size
        self._flatten = flatten
        self._queue: queue.Queue[StepBatch | Exception] = queue.Queue(maxsize=AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(start,), name="ptafuse-feed", daemon=True)
        self._thread.start()

    def next(self) -> tuple[StepBatch, float]:
        """Return the next step's batch, and the seconds spent waiting for it.

        Raises:
            Exception: what reading raised; the step it would have been read for is not trained.
        """
        started = time.perf_counter()
        item = self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item, time.perf_counter() - started

    def _read(self, start: int) -> None:
        try:
            for step in range(start, self._schedule.num_steps):
                self._put(self._batch(step))
                if self._stop.is_set():
                    return
        except Exception as error:  # noqa: BLE001 - raised again by `next`, in the thread that trains
            self._put(error)

    def _put(self, item: StepBatch | Exception) -> None:
        # With a timeout: a plain put would block forever on a full queue that nobody reads any more.
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def _batch(self, step: int) -> StepBatch:
        indices = self._schedule.blocks(step)
        # Lengths differ by at most one and the first slices are the longest, so the first gives the number of passes.
        slices = np.array_split(indices, self._size)
        num_micro_batches = -(-len(slices[0]) // self._micro_batch_size)
        self._blocks.prepare(slices[self._rank].tolist())
        blocks = [self._blocks.block(int(index)) for index in slices[self._rank]]
        groups = [
            blocks[number * self._micro_batch_size : (number + 1) * self._micro_batch_size]
            for number in range(num_micro_batches)
        ]
        return StepBatch(
            step=step,
            blocks=tuple(int(index) for index in indices),
            names=tuple(tuple(block.name for block in group) for group in groups),
            micro_batches=tuple(self._micro_batch(group) for group in groups),
            num_labels=num_labels(blocks),
            num_fused=sum(int(block.fused.present.sum()) for block in blocks if block.fused is not None),
            num_tokens=sum(len(block.ids) for block in blocks),
        )

    def _micro_batch(self, blocks: Sequence[Block]) -> MicroBatch:
        """Collate some blocks; for a GPU in pinned memory, so that this thread and not the training pays for the copy."""
        micro_batch = collate(blocks, flatten=self._flatten) if blocks else empty_micro_batch()
        return micro_batch.pin_memory() if self._pins else micro_batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


def num_labels(blocks: Sequence[Block]) -> int:
    """Count the labelled positions of some blocks."""
    return sum(int((block.labels != IGNORED).sum()) for block in blocks)


def empty_micro_batch() -> MicroBatch:
    """Return a batch of one token that counts nothing.

    A worker without blocks needs it to take part in the step's collective operations.
    """
    return MicroBatch(
        ids=torch.zeros((1, 1), dtype=torch.int64),
        labels=torch.full((1, 1), IGNORED, dtype=torch.int64),
        targets=None,
        num_tokens=0,
    )
