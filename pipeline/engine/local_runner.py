"""The in-process runner: one worker, one shard after the other, no Ray."""

import dataclasses
from collections.abc import Iterator, Sequence

from pipeline.engine.worker import ShardJob, ShardStatus, ShardWorker
from pipeline.run.stage_table import Resources
from pipeline.settings.run import EngineConfig


def run_shards(
    job: ShardJob, pending: Sequence[int], resources: Resources, engine: EngineConfig
) -> Iterator[ShardStatus]:
    """Compute shards in order; yields each status as it comes. ``engine`` is for Ray alone."""
    del engine
    worker = ShardWorker(dataclasses.replace(job, gpus=_num_gpus(resources)))
    for shard in pending:
        yield worker.run(shard)


def _num_gpus(resources: Resources) -> float:
    """GPUs that this process computes on: one where a model may use one and there is one."""
    if resources.gpus == 0:
        return 0.0
    from stages.models.devices import resolve_device

    return 1.0 if resolve_device("auto").type == "cuda" else 0.0
