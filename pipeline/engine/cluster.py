"""Ray cluster of a command: joining it, how many workers fit on it, and waiting until it has grown.

A cluster that ``RAY_ADDRESS`` names may be autoscaled and start without machines: the machines that are alive when a step
begins then determine neither how many workers the step can have nor whether there are GPUs.
"""

import logging
import os
import socket
import time
from collections.abc import Mapping
from typing import Any, Final

import ray
import ray.util

from pipeline.run.specs import Resources
from pipeline.settings.run import EngineConfig

log = logging.getLogger(__name__)

REPORT_SECONDS: Final = 60.0
GROWN_WORKERS: Final = 32
"""Number of workers that a cluster of unknown size is assumed to grow to if ``num_workers`` is not set."""


def start_ray(engine: EngineConfig) -> None:
    """Join the cluster that ``RAY_ADDRESS`` names, or start a Ray on this machine; nothing if one is connected.

    Args:
        engine: CPUs of a Ray started here, and how long a cluster is waited for.

    Raises:
        ConnectionError: no cluster answers at that address.
        ValueError: the value is not an address.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        # Ray's own hints would drown the progress; its log files are in /tmp/ray as always. Its core prints a warning for
        # every actor that may be restarted. Ours may be: everything of value is on disk.
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
    """Wait until a Ray cluster answers, for a limited time: Ray itself would keep asking silently.

    Args:
        address: ``HOST:PORT`` of a head node, or ``ray://HOST:PORT``. Ray itself reports soon if other
            addresses (``auto``, a provider's) are wrong.
        seconds: time to wait for an answer.

    Raises:
        ConnectionError: no answer came; says why, as far as that is known.
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
        for timeout in (min(2.0, seconds), max(0.0, seconds - 2.0)):
            try:
                is_ready.result(timeout=timeout)
            except grpc.FutureTimeoutError:
                if timeout < seconds:
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
    return "a service other than Ray listens there"


def is_joined() -> bool:
    """Return whether the command joined an existing cluster instead of starting Ray itself."""
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def can_grow(engine: EngineConfig) -> bool:
    """Return whether machines may join while a step runs. A Ray that was started here has only this machine."""
    return is_joined() and engine.autoscaling is not False


def gpus_per_worker(configured: float | None, device: str, engine: EngineConfig, *, section: str) -> float:
    """Return how many GPUs a worker reserves.

    Args:
        configured: ``gpus_per_worker`` of the section; None if not set.
        device: ``device`` of the section, which decides if ``gpus_per_worker`` is not set.
        engine: whether the cluster can grow.
        section: section of the configuration, for messages.

    Raises:
        ValueError: it depends on the cluster, whose GPUs may not have joined yet.
    """
    if configured is not None:
        return configured
    if device != "auto":
        return float(device == "cuda")
    if can_grow(engine):
        raise ValueError(
            f"{section}.device = 'auto' and no {section}.gpus_per_worker on a cluster that may grow: its GPU machines "
            f"may not have joined yet, and {section} would run on CPUs. Set {section}.device = 'cuda' or 'cpu', or "
            "engine.autoscaling = false if the cluster is complete"
        )
    return float(ray.cluster_resources().get("GPU", 0) > 0)


def pool_size(resources: Resources, num_pending: int, engine: EngineConfig) -> int:
    """Return how many actors a step has at most.

    As many as configured; else as many as there are shards where the cluster can grow (Ray Data starts those that find
    room and asks for machines), and as many as fit where it cannot. Without GPUs one, if the actors load models.
    """
    if resources.num_workers:
        return min(resources.num_workers, num_pending)
    if resources.models and not resources.gpus:
        return 1
    if can_grow(engine):
        return num_pending
    places = sum(num_places(node, resources.cpus, resources.gpus or 0.0) for node in _live_nodes())
    return max(1, min(places, num_pending))


def shards_at_once(resources: Resources, num_pending: int, engine: EngineConfig) -> int:
    """Return how many shards each actor of a step has at once.

    As many as the stage lets overlap, but one where every pending shard can have an actor of its own: an actor with two
    would leave a GPU without work. With more shards than actors some actor computes two in any case, and then it is
    faster to overlap them.

    Args:
        resources: resources of each actor.
        num_pending: shards that are left to compute.
        engine: whether the cluster can grow.
    """
    num_actors = pool_size(resources, num_pending, engine)
    places = sum(num_places(node, resources.cpus, resources.gpus or 0.0) for node in _live_nodes())
    if not can_grow(engine):
        num_actors = min(num_actors, places)  # `num_workers` may ask for more than fit
    elif not resources.num_workers:
        # The pool has at most as many actors as there are shards; how many machines will join is unknown.
        num_actors = min(num_actors, max(places, GROWN_WORKERS))
    return 1 if num_pending <= num_actors else resources.shards_per_worker


def num_places(node: Mapping[str, float], cpus: float, gpus: float) -> int:
    """Return how many workers fit on a machine.

    Args:
        node: resource -> amount, as Ray names them (``"CPU"``, ``"GPU"``).
        cpus: CPUs of each worker.
        gpus: GPUs of each worker.
    """
    needed = {"CPU": cpus, "GPU": gpus}
    return min((int(node.get(name, 0) / amount) for name, amount in needed.items() if amount), default=1)


def warn_of_idle_gpus(name: str, cpus: float, gpus: float) -> None:
    """Warn of machines whose CPUs do not suffice for a worker on each of their GPUs."""
    for node in _live_nodes():
        by_gpus, places = num_places(node, 0, gpus) if gpus else 0, num_places(node, cpus, gpus)
        if places < by_gpus:
            log.warning(
                "%s: a machine with %g CPUs and %g GPUs has room for %d workers of %g CPUs and %g GPUs, so %g GPUs stay "
                "idle: lower cpus_per_worker to %g, or give each machine %g CPUs",
                *(name, node.get("CPU", 0), node["GPU"], places, cpus, gpus, node["GPU"] - places * gpus),
                *(node.get("CPU", 0) / by_gpus, by_gpus * cpus),
            )
            return


def require_resources(name: str, cpus: float, gpus: float, engine: EngineConfig, *, count: int = 1) -> None:
    """Wait until workers fit, if necessary until the cluster has grown. Ray itself would wait silently and forever.

    If the cluster can grow, its autoscaler is asked for the machines, since nothing else requests them yet.

    Args:
        name: name of what needs the workers, for messages.
        cpus: CPUs of each worker.
        gpus: GPUs of each worker.
        engine: whether the cluster can grow, and how long to wait.
        count: workers that run at the same time.

    Raises:
        ValueError: they do not fit, and nothing will change that, or nothing has within ``cluster_timeout_seconds``.
    """
    shortage = _shortage(name, cpus, gpus, count)
    if shortage is None:
        return
    if not can_grow(engine):
        raise ValueError(shortage)
    limit = engine.cluster_timeout_seconds
    log.warning("%s. Waiting up to %d s for the cluster to grow", shortage, limit)
    started = time.monotonic()
    # A placement group is demand that every autoscaler sees, and it says itself when all its bundles have found room.
    group = ray.util.placement_group([{"CPU": cpus, **({"GPU": gpus} if gpus else {})}] * count)
    try:
        while not group.wait(min(REPORT_SECONDS, max(1.0, started + limit - time.monotonic()))):
            waited = time.monotonic() - started
            shortage = _shortage(name, cpus, gpus, count) or f"{name}: there is room, but other jobs use it"
            if waited >= limit:
                raise ValueError(
                    f"{shortage}. The cluster has not grown within engine.cluster_timeout_seconds = {limit}: look at `ray "
                    "status` on its head (quota, spot capacity, images that cannot be pulled), then run the command again"
                )
            log.warning("%s: still waiting after %d s: %s", name, waited, shortage)
    finally:
        ray.util.remove_placement_group(group)  # the room is for the workers, which come next
    log.info("%s: the cluster grew after %d s", name, time.monotonic() - started)


def _shortage(name: str, cpus: float, gpus: float, count: int) -> str | None:
    """Return why workers do not fit now; None if they do."""
    nodes = _live_nodes()
    places = sum(num_places(node, cpus, gpus) for node in nodes)
    if places >= count:
        return None
    largest = max(((node.get("CPU", 0), node.get("GPU", 0)) for node in nodes), default=(0, 0))
    return (
        f"{name} asks for {cpus:g} CPUs and {gpus:g} GPUs per worker, {count} worker(s) at once, and the cluster has "
        f"room for {places}: the largest of {len(nodes)} node(s) has {largest[0]:g} CPUs and {largest[1]:g} GPUs. "
        "Lower num_workers, cpus_per_worker or gpus_per_worker, or use more or larger machines"
    )


def _live_nodes() -> list[dict[str, Any]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
