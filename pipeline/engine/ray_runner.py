"""Ray Data runner: one row per shard, an actor pool of workers. The only file that imports ``ray.data``.

The driver passes shard numbers, never data: the worker reads, computes and commits, and returns a small status row.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import ray.data
import ray.exceptions
from ray.util.metrics import Counter

from pipeline.engine.cluster import (
    gpus_per_worker,
    pool_size,
    require_resources,
    shards_at_once,
    start_ray,
    warn_of_idle_gpus,
)
from pipeline.engine.worker import ShardJob, ShardStatus, ShardWorker
from pipeline.run.specs import Resources
from pipeline.settings.run import EngineConfig
from stages.contract.environment import DriverEnvironment
from stages.contract.filesystem import StoreError

SCALE_UP_UTILISATION = 1.0  # with as many tasks in flight as calls, utilisation never exceeds 1; Ray's default is 1.75
STORE_FAILED = "store failed"
"""Outcome of a shard whose worker could not use the run directory or the dataset; it ends the command."""
ACTOR_INIT_DEATHS = 3  # one out-of-memory while an actor starts must not end the job


class RayShardWorker:
    """A ``ShardWorker`` as Ray Data calls it: a batch of one shard number in, a batch of one status out.

    Called from as many threads as the actor has shards at once, see ``actor_pool``.
    """

    def __init__(self, job: ShardJob, environment: DriverEnvironment) -> None:
        """Prepare the worker; Ray calls this once per actor."""
        environment.apply()
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
        self._worker = ShardWorker(job)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Compute the shard."""
        shard = int(batch["shard"][0])
        try:
            row = dataclasses.asdict(self._worker.run(shard))
        except StoreError as error:  # as a row: raised here, it would reach the user inside four tracebacks of Ray's
            row = {**dataclasses.asdict(ShardStatus(shard, "failed", message=str(error))), "outcome": STORE_FAILED}
        return {name: [value] for name, value in row.items()}


class ShardMetrics:
    """Counters for the Prometheus endpoint of the driver's Ray node: ``ray_ptafuse_shards_done_total`` and others.

    The driver counts, not the workers: a worker that dies would take the counts of its last seconds with it.
    """

    def __init__(self, stage: str, model: str | None) -> None:
        """Start at 0.

        Args:
            stage: becomes a label.
            model: becomes a label too; empty for a stage without one.
        """
        tags = {"stage": stage, "model": model or ""}
        self._shards = _counter("ptafuse_shards_done", "Shards computed and committed.", tags)
        self._tokens = _counter("ptafuse_tokens", "Tokens of these shards.", tags)
        self._failures = _counter("ptafuse_shards_failed", "Shards given up after all their attempts.", tags)

    def count(self, status: ShardStatus) -> None:
        """Count a shard; one that was done before costs nothing and counts nothing."""
        if status.outcome == "done":
            self._shards.inc()
            if status.num_tokens:  # a counter takes no 0
                self._tokens.inc(status.num_tokens)
        elif status.outcome == "failed":
            self._failures.inc()


def _counter(name: str, description: str, tags: dict[str, str]) -> Counter:
    counter = Counter(name, description=description, tag_keys=tuple(tags))
    counter.set_default_tags(tags)
    return counter


def actor_pool(resources: Resources, num_pending: int, engine: EngineConfig) -> ray.data.ActorPoolStrategy:
    """Return how many actors a step has, and how many shards each of them has at once.

    Ray Data gives the next shard to the actor that has the fewest, and to none that has ``max_tasks_in_flight_per_actor``.
    So an actor gets its second shard only when all that have started have their first, and the last shards are spread.

    Args:
        resources: resources of each actor, with resolved GPUs.
        num_pending: shards to compute.
        engine: whether the cluster can grow.
    """
    num_shards = shards_at_once(resources, num_pending, engine)
    return ray.data.ActorPoolStrategy(
        min_size=1,
        max_size=pool_size(resources, num_pending, engine),
        # No more than are computed at once: a shard that only waits in an actor could run in another one.
        max_tasks_in_flight_per_actor=num_shards,
        max_concurrent_calls_per_actor=num_shards,
        # Otherwise Ray Data calls the worker from only one thread, and shards would still wait for each other.
        enable_true_multi_threading=num_shards > 1,
    )


def run_shards(
    job: ShardJob, pending: Sequence[int], resources: Resources, engine: EngineConfig
) -> Iterator[ShardStatus]:
    """Compute shards on Ray; yields each status when its shard is finished, in any order.

    Args:
        job: job to compute.
        pending: shard numbers.
        resources: resources of each actor.
        engine: settings for starting Ray here, and for when Ray Data gives up.
    """
    start_ray(engine)
    gpus = gpus_per_worker(resources.gpus, "auto", engine, section=job.step.stage)
    resources = dataclasses.replace(resources, gpus=gpus)
    job = dataclasses.replace(job, gpus=gpus)
    require_resources(job.step.key, resources.cpus, gpus, engine)
    warn_of_idle_gpus(job.step.key, resources.cpus, gpus)
    context = ray.data.DataContext.get_current()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.enable_progress_bars = False  # Ray's bars count blocks; ours count shards, tokens and time
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = engine.no_progress_timeout_seconds
    context.max_errored_blocks = 0  # above 0 Ray drops rows with a log line only
    context.actor_init_retry_on_errors = True
    context.max_consecutive_actor_init_deaths = ACTOR_INIT_DEATHS
    context.autoscaling_config.actor_pool_util_upscaling_threshold = SCALE_UP_UTILISATION
    shards = ray.data.from_items([{"shard": shard} for shard in pending], override_num_blocks=len(pending))
    statuses = shards.map_batches(
        RayShardWorker,
        batch_size=1,
        fn_constructor_args=(job, DriverEnvironment.here()),
        compute=actor_pool(resources, len(pending), engine),
        num_cpus=resources.cpus,
        num_gpus=gpus or None,
    )  # Ray Data restarts a killed actor without limit by default; the attempts on disk set the limit
    metrics = ShardMetrics(job.step.stage, job.step.model)
    try:
        for row in statuses.iter_rows():
            if row["outcome"] == STORE_FAILED:
                raise StoreError(row["message"])
            status = ShardStatus(**row)
            metrics.count(status)
            yield status
    except ray.exceptions.RayError as error:
        raise RuntimeError(
            f"{job.step.key}: Ray ended the job: {error}\nFinished shards are kept; run the same command again."
        ) from error
