"""The Ray Data runner: one row a shard, an actor pool of workers. The only file that imports ``ray.data``.

The driver passes shard numbers, never data: the worker reads, computes and commits, and returns a small status row.
"""

import dataclasses
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
import ray.data
import ray.exceptions
from ray.util.metrics import Counter

from pipeline.engine.worker import ShardJob, ShardStatus, ShardWorker
from pipeline.run.stage_table import Resources
from pipeline.settings.run import EngineConfig
from stages.contract.filesystem import StoreError

log = logging.getLogger(__name__)

SCALE_UP_UTILISATION = 1.0  # with one task in flight an actor's utilisation never exceeds 1; Ray's default is 1.75
STORE_FAILED = "store failed"
"""Outcome of a shard whose worker could not use the run directory or the dataset; it ends the command."""
ACTOR_INIT_DEATHS = 3  # one out-of-memory while an actor starts must not end the job


class RayShardWorker:
    """A ``ShardWorker`` as Ray Data calls it: a batch of one shard number in, a batch of one status out."""

    def __init__(self, job: ShardJob) -> None:
        """Called once an actor."""
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
    """What was done, for the Prometheus endpoint of the driver's Ray node: ``ray_ptafuse_shards_done_total`` and others.

    The driver counts, not the workers: those come and go, and what one counted in its last seconds would go with it.
    """

    def __init__(self, stage: str, model: str | None) -> None:
        """Start at 0.

        Args:
            stage: becomes a label.
            model: likewise; empty for a stage without one.
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


def start_ray(engine: EngineConfig) -> None:
    """Join the cluster that ``RAY_ADDRESS`` names, or start a Ray on this machine; nothing if one is connected.

    Args:
        engine: CPUs of a Ray started here, and how long a cluster is waited for.

    Raises:
        ConnectionError: no cluster answers at that address.
        ValueError: it is no address.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        # Ray's own hints would drown the progress; its log files are in /tmp/ray as always. Its core prints a warning for
        # every actor that may be restarted, which ours may: what is lost with an actor is on disk.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        ray.init(
            address="local",
            num_cpus=engine.num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    else:
        require_cluster(address, engine.connect_timeout_seconds)
        ray.init(address=address)
        log.info("joined the Ray cluster at %s", address)


def require_cluster(address: str, seconds: float) -> None:
    """Wait until a Ray cluster answers, for a limited time: Ray itself would go on asking without a word.

    Args:
        address: ``HOST:PORT`` of a head node, or ``ray://HOST:PORT``. Of others (``auto``, a provider's) Ray says soon whether
            they lead anywhere.
        seconds: how long an answer is waited for.

    Raises:
        ConnectionError: none came; says why, as far as that is known.
        ValueError: the address has no port.
    """
    place = address.removeprefix("ray://")
    if place == "auto" or "://" in place:
        return
    host, _, port = place.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f"RAY_ADDRESS={address}: expected HOST:PORT, as `ray start --head` prints it, e.g. 10.0.0.1:6379; unset it to "
            "compute on this machine"
        )
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return  # a probe would need the cluster's certificates
    import grpc  # both ports of a cluster speak it; Ray depends on it

    # As Ray itself: a proxy for the web does not lead to a cluster.
    with grpc.insecure_channel(place, options=(("grpc.enable_http_proxy", 0),)) as channel:
        is_ready = grpc.channel_ready_future(channel)
        for part in (min(2.0, seconds), max(0.0, seconds - 2.0)):
            try:
                is_ready.result(timeout=part)
            except grpc.FutureTimeoutError:
                if part < seconds:
                    log.info("waiting for the Ray cluster at %s, up to %g s", address, seconds)
            else:
                return
        is_ready.cancel()
    raise ConnectionError(
        f"RAY_ADDRESS={address}: no Ray cluster answers there within {seconds:g} s ({_why_unreachable(host, int(port))}): "
        "start it, correct RAY_ADDRESS, or unset it to compute on this machine (engine.connect_timeout_seconds waits longer)"
    )


def _why_unreachable(host: str, port: int) -> str:
    try:
        socket.create_connection((host.strip("[]"), port), timeout=2).close()
    except OSError as error:
        return error.strerror or str(error)
    return "something listens there, and it does not speak Ray's protocol"


def run_shards(
    job: ShardJob, pending: Sequence[int], resources: Resources, engine: EngineConfig
) -> Iterator[ShardStatus]:
    """Compute shards on Ray; yields each status as it comes, in any order.

    Args:
        job: what to compute.
        pending: shard numbers.
        resources: what each actor needs.
        engine: how a Ray is started here, and when Ray Data gives up.
    """
    start_ray(engine)
    if resources.gpus is None:
        resources = dataclasses.replace(resources, gpus=1.0 if ray.cluster_resources().get("GPU") else 0.0)
    job = dataclasses.replace(job, gpus=resources.gpus)
    require_resources(job.step.key, resources.cpus, resources.gpus or 0.0)
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
        fn_constructor_args=(job,),
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=_pool_size(resources, len(pending)), max_tasks_in_flight_per_actor=1
        ),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus or None,
    )  # Ray Data's default restarts a killed actor without end: the attempts on disk are what bounds it
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


def require_resources(what: str, cpus: float, gpus: float, *, count: int = 1) -> None:
    """Refuse workers that do not fit, which Ray would wait for in silence; a cluster may still grow, and warns.

    Args:
        what: who asks.
        cpus: of each worker.
        gpus: of each worker.
        count: workers that run at the same time.

    Raises:
        ValueError: says what is asked for and what there is.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    places = sum(_places(node, cpus, gpus) for node in nodes)
    if places >= count:
        return
    largest = max((node.get("CPU", 0), node.get("GPU", 0)) for node in nodes)
    message = (
        f"{what} asks for {cpus:g} CPUs and {gpus:g} GPUs a worker, {count} worker(s) at once, and there is room for {places}: "
        f"the largest of {len(nodes)} node(s) has {largest[0]:g} CPUs and {largest[1]:g} GPUs. Lower num_workers, "
        "cpus_per_worker or gpus_per_worker, or use more or larger machines"
    )
    if os.environ.get("RAY_ADDRESS"):
        log.warning("%s; waiting for the cluster to grow", message)
        return
    raise ValueError(message)


def _places(node: Mapping[str, float], cpus: float, gpus: float) -> int:
    """Workers that fit on a node."""
    needed = {"CPU": cpus, "GPU": gpus}
    return min((int(node.get(name, 0) / amount) for name, amount in needed.items() if amount), default=1)


def _pool_size(resources: Resources, num_pending: int) -> int:
    """Actors at most: as configured, or as many as the cluster holds (without GPUs one, if it loads models)."""
    if resources.num_workers:
        return min(resources.num_workers, num_pending)
    if resources.models and not resources.gpus:
        return 1
    cluster = ray.cluster_resources()
    fits = int(cluster.get("CPU", 1) / resources.cpus)
    if resources.gpus:
        fits = min(fits, int(cluster.get("GPU", 0) / resources.gpus))
    return max(1, min(fits, num_pending))
