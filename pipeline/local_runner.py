"""The in-process runner: one worker, one shard after the other, no Ray."""

from collections.abc import Iterator, Sequence

from pipeline.config import EngineConfig
from pipeline.stage_table import Resources
from pipeline.worker import ShardJob, ShardStatus, ShardWorker


def run_shards(
    job: ShardJob, pending: Sequence[int], resources: Resources, engine: EngineConfig
) -> Iterator[ShardStatus]:
    """Compute shards in order; yields each status as it comes. ``resources`` and ``engine`` are for Ray alone."""
    del resources, engine
    worker = ShardWorker(job)
    for shard in pending:
        yield worker.run(shard)
