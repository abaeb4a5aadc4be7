"""In-process runner without Ray: one worker that computes one shard after the other, or several if the stage allows it."""

import ctypes
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice

from pipeline.engine.worker import ShardJob, ShardStatus, ShardWorker
from pipeline.run.specs import Resources
from pipeline.settings.run import EngineConfig


def run_shards(
    job: ShardJob, pending: Sequence[int], resources: Resources, engine: EngineConfig
) -> Iterator[ShardStatus]:
    """Compute shards, started in order; yields each status when its shard is finished. ``engine`` is only used by Ray.

    Raises:
        StoreError: the run directory or the dataset cannot be used; shards under way are finished first.
    """
    del engine
    worker = ShardWorker(dataclasses.replace(job, gpus=_num_gpus(resources)))
    num_threads = min(resources.shards_per_worker, len(pending))
    if num_threads > 1:
        yield from _Threads(worker).run(pending, num_threads)
        return
    for shard in pending:
        yield worker.run(shard)


class _Threads:
    """Threads in which a worker's shards overlap."""

    def __init__(self, worker: ShardWorker) -> None:
        self._worker = worker
        self._computing: set[int] = set()

    def run(self, pending: Sequence[int], num_threads: int) -> Iterator[ShardStatus]:
        """Compute shards; yields each status when its shard is finished.

        Args:
            pending: the shards.
            num_threads: number of shards at once.
        """
        shards = iter(pending)
        with ThreadPoolExecutor(num_threads, thread_name_prefix="shard") as pool:
            running = {pool.submit(self._compute, shard) for shard in islice(shards, num_threads)}
            try:
                while running:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    statuses = [future.result() for future in done]
                    running |= {pool.submit(self._compute, shard) for shard in islice(shards, len(done))}
                    yield from statuses
            except Exception:
                raise  # the pool waits for the shards under way: their results are kept
            # Ctrl-C, which Python delivers only to the main thread, or a caller that stops iterating.
            except BaseException:
                self._interrupt()
                raise

    def _compute(self, shard: int) -> ShardStatus:
        self._computing.add(threading.get_ident())
        try:
            return self._worker.run(shard)
        finally:
            self._computing.discard(threading.get_ident())

    def _interrupt(self) -> None:
        """End the shards under way as Ctrl-C would end the main thread's: after the call of a library that they are in."""
        for thread in self._computing.copy():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(KeyboardInterrupt))


def _num_gpus(resources: Resources) -> float:
    """Return the number of GPUs that this process computes on: 1 if a model may use one and there is one, else 0."""
    if resources.gpus == 0:
        return 0.0
    from stages.models.devices import resolve_device

    return 1.0 if resolve_device("auto").type == "cuda" else 0.0
