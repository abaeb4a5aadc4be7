"""How a command joins a cluster and its steps find room there, with stubs of Ray's cluster state."""

import dataclasses
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from pipeline.engine import cluster
from pipeline.run.specs import Resources
from pipeline.settings.load import load_config
from pipeline.settings.run import EngineConfig


def nodes(*resources: dict[str, float]):
    return lambda: (
        [{"Alive": True, "Resources": node} for node in resources] + [{"Alive": False, "Resources": {"CPU": 99}}]
    )


HEAD_ONLY = nodes({"memory": 8e9})
FIXED = EngineConfig(autoscaling=False)


class Group:
    """A placement group that finds room on a cluster of stubs after so many waits."""

    def __init__(self, waits: int) -> None:
        self.waits = waits
        self.bundles: list[dict[str, float]] = []
        self.removed = False

    def create(self, bundles: list[dict[str, float]]) -> "Group":
        self.bundles = bundles
        return self

    def remove(self, group: "Group") -> None:
        assert group is self
        self.removed = True

    def wait(self, timeout: float) -> bool:
        assert timeout > 0
        self.waits -= 1
        return self.waits < 0


@pytest.fixture
def group(monkeypatch) -> Group:
    stub = Group(waits=2)
    monkeypatch.setattr(cluster.ray.util, "placement_group", stub.create)
    monkeypatch.setattr(cluster.ray.util, "remove_placement_group", stub.remove)
    return stub


@pytest.fixture
def joined(monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")


@pytest.mark.parametrize(
    ("cpus", "gpus", "count"),
    [(8, 0, 1), (4, 0, 4), (2, 1, 6), (0.5, 0, 30)],
)
def test_workers_that_fit_are_let_through(monkeypatch, cpus, gpus, count):
    monkeypatch.setattr(cluster.ray, "nodes", nodes({"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 2}))
    assert cluster.require_resources("train", cpus, gpus, EngineConfig(), count=count) is None


@pytest.mark.parametrize(("cpus", "gpus", "count"), [(9, 0, 1), (8, 0, 3), (2, 1, 7), (1, 5, 1)])
def test_workers_that_never_fit_a_ray_of_this_machine_are_refused_at_once(monkeypatch, cpus, gpus, count):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.ray, "nodes", nodes({"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 2}))
    with pytest.raises(ValueError, match=f"{count} worker\\(s\\) at once, and the cluster has room for"):
        cluster.require_resources("train", cpus, gpus, EngineConfig(autoscaling=True), count=count)


def test_workers_that_never_fit_a_joined_cluster_of_fixed_size_are_refused_at_once(monkeypatch, joined, group):
    monkeypatch.setattr(cluster.ray, "nodes", nodes({"CPU": 8}))
    with pytest.raises(
        ValueError, match=r"8 CPUs and 1 GPUs per worker, 2 worker\(s\) at once, and the cluster has room for 0"
    ):
        cluster.require_resources("train", 8, 1, FIXED, count=2)
    assert not group.bundles


def test_a_cluster_that_can_grow_is_asked_for_the_room_and_waited_for(monkeypatch, joined, group, caplog):
    monkeypatch.setattr(cluster.ray, "nodes", HEAD_ONLY)
    cluster.require_resources("train", 8, 1, EngineConfig(), count=2)
    assert group.bundles == [{"CPU": 8, "GPU": 1}] * 2
    assert group.removed, "a group that stays would take the room from the workers"
    assert "Waiting up to 3600 s for the cluster to grow" in caplog.text
    assert caplog.text.count("still waiting after") == 2


def test_waiting_ends_with_an_error_that_says_where_to_look(monkeypatch, joined, group):
    monkeypatch.setattr(cluster.ray, "nodes", HEAD_ONLY)
    seconds = iter(range(0, 10_000, 50))
    monkeypatch.setattr(cluster.time, "monotonic", lambda: next(seconds))
    group.waits = 1000
    with pytest.raises(
        ValueError, match=r"not grown within engine\.cluster_timeout_seconds = 600: look at `ray status`"
    ):
        cluster.require_resources("logits/mpt", 4, 1, EngineConfig(cluster_timeout_seconds=600))
    assert group.removed


def test_on_a_cluster_that_starts_empty_the_pool_is_sized_by_the_shards(monkeypatch, joined):
    monkeypatch.setattr(cluster.ray, "nodes", HEAD_ONLY)
    gpu_workers = Resources(None, cpus=4, gpus=1, models=True)
    assert cluster.pool_size(gpu_workers, 500, EngineConfig()) == 500
    assert cluster.pool_size(Resources(None, cpus=1, gpus=0), 500, EngineConfig()) == 500
    assert cluster.pool_size(Resources(32, cpus=4, gpus=1), 500, EngineConfig()) == 32
    assert cluster.pool_size(Resources(32, cpus=4, gpus=1), 3, EngineConfig()) == 3


def test_on_a_cluster_of_fixed_size_the_pool_is_what_fits_machine_by_machine(monkeypatch, joined):
    monkeypatch.setattr(cluster.ray, "nodes", nodes({"CPU": 64, "GPU": 8}, {"CPU": 6, "GPU": 8}, {"memory": 8e9}))
    assert cluster.pool_size(Resources(None, cpus=4, gpus=1, models=True), 500, FIXED) == 8 + 1
    assert cluster.pool_size(Resources(None, cpus=4, gpus=0), 500, FIXED) == 16 + 1
    assert cluster.pool_size(Resources(None, cpus=4, gpus=0), 5, FIXED) == 5


def test_without_gpus_one_worker_loads_models(monkeypatch, joined):
    monkeypatch.setattr(cluster.ray, "nodes", nodes({"CPU": 64}))
    for engine in (FIXED, EngineConfig()):
        assert cluster.pool_size(Resources(None, cpus=4, gpus=0, models=True), 500, engine) == 1


OVERLAPPING = Resources(None, cpus=4, gpus=1, models=True, shards_per_worker=2)


@pytest.mark.parametrize(
    ("num_workers", "num_pending", "expected"),
    [
        (None, 1, 1),
        (None, 8, 1),  # as many as GPUs
        (None, 9, 2),
        (None, 500, 2),
        (2, 2, 1),
        (2, 3, 2),
        (64, 20, 2),  # 8 of the 64 fit, and some of them compute more than one
    ],
)
def test_an_actor_has_two_shards_only_where_there_are_more_shards_than_gpus(
    monkeypatch, joined, num_workers, num_pending, expected
):
    monkeypatch.setattr(cluster.ray, "nodes", nodes({"CPU": 32, "GPU": 4}, {"CPU": 32, "GPU": 4}, {"CPU": 8}))
    resources = dataclasses.replace(OVERLAPPING, num_workers=num_workers)
    assert cluster.shards_at_once(resources, num_pending, FIXED) == expected


@pytest.mark.parametrize(
    ("num_workers", "num_pending", "expected"),
    [
        (None, cluster.GROWN_WORKERS, 1),  # one machine now, and perhaps one per shard soon
        (None, cluster.GROWN_WORKERS + 1, 2),
        (100, 100, 1),
        (100, 101, 2),
        (2, 3, 2),
    ],
)
def test_on_a_cluster_that_can_grow_a_few_shards_wait_for_gpus_of_their_own(
    monkeypatch, joined, num_workers, num_pending, expected
):
    monkeypatch.setattr(cluster.ray, "nodes", nodes({"CPU": 4, "GPU": 1}))
    resources = dataclasses.replace(OVERLAPPING, num_workers=num_workers)
    assert cluster.shards_at_once(resources, num_pending, EngineConfig()) == expected


def test_on_a_large_cluster_that_can_grow_its_machines_are_counted(monkeypatch, joined):
    monkeypatch.setattr(cluster.ray, "nodes", nodes(*[{"CPU": 64, "GPU": 8}] * 8))
    assert cluster.shards_at_once(OVERLAPPING, 64, EngineConfig()) == 1
    assert cluster.shards_at_once(OVERLAPPING, 65, EngineConfig()) == 2


def test_without_gpus_the_one_worker_overlaps_from_the_second_shard_on(monkeypatch, joined):
    monkeypatch.setattr(cluster.ray, "nodes", nodes({"CPU": 64}))
    on_cpu = dataclasses.replace(OVERLAPPING, gpus=0)
    for engine in (FIXED, EngineConfig()):
        assert [cluster.shards_at_once(on_cpu, count, engine) for count in (1, 2, 3)] == [1, 2, 2]


def test_shards_of_other_stages_never_overlap(monkeypatch, joined):
    monkeypatch.setattr(cluster.ray, "nodes", nodes({"CPU": 2}))
    assert cluster.shards_at_once(Resources(None, cpus=1, gpus=0), 500, FIXED) == 1


def test_gpus_are_never_guessed_from_the_machines_of_a_cluster_that_can_grow(monkeypatch, joined):
    """GPU pods that idled out while align and fuse ran would leave training on CPUs, with gloo."""
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 64})
    growing = EngineConfig()
    assert cluster.gpus_per_worker(None, "cuda", growing, section="train") == 1
    assert cluster.gpus_per_worker(None, "cpu", growing, section="train") == 0
    assert cluster.gpus_per_worker(1, "auto", growing, section="train") == 1
    with pytest.raises(ValueError, match=r"Set train\.device = 'cuda' or 'cpu'"):
        cluster.gpus_per_worker(None, "auto", growing, section="train")
    assert cluster.gpus_per_worker(None, "auto", FIXED, section="train") == 0
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 64, "GPU": 8})
    assert cluster.gpus_per_worker(None, "auto", FIXED, section="train") == 1


def test_gpus_that_stay_idle_for_want_of_cpus_are_named(monkeypatch, caplog):
    monkeypatch.setattr(cluster.ray, "nodes", nodes({"CPU": 64, "GPU": 8}))
    cluster.warn_of_idle_gpus("train", 8, 1)
    assert not caplog.text
    monkeypatch.setattr(cluster.ray, "nodes", nodes({"CPU": 16, "GPU": 8}))
    cluster.warn_of_idle_gpus("train", 8, 1)
    assert "room for 2 workers of 8 CPUs and 1 GPUs, so 6 GPUs stay idle" in caplog.text
    assert "lower cpus_per_worker to 2, or give each machine 64 CPUs" in caplog.text


def test_the_shipped_llama_configuration_leaves_nothing_to_guess(monkeypatch, joined):
    from pipeline.run.stage_table import sharded_stage

    config = load_config("llama2_7b")
    for model in config.models:
        assert sharded_stage("logits").resources(config, model.name).gpus == 1
    train = config.train
    assert (train.device, train.gpus_per_worker, config.logits.device) == ("cuda", 1, "cuda")


@pytest.mark.parametrize(("gpus_per_worker", "size", "expected"), [(None, 1, 1), (None, 4, 4), (0.5, 1, 0.5)])
def test_device_cuda_reserves_gpus_without_asking_the_cluster(gpus_per_worker, size, expected):
    from pipeline.run.stage_table import sharded_stage

    config = load_config("demo")
    logits = config.logits.model_copy(
        update={"device": "cuda", "gpus_per_worker": gpus_per_worker, "tensor_parallel_size": size}
    )
    config = config.model_copy(update={"logits": logits})
    assert sharded_stage("logits").resources(config, config.target.name).gpus == expected


def start_within(seconds, address, monkeypatch):
    """Join a cluster that is not there, with a limit of half a second."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", lambda **_: pytest.fail("Ray would wait without end"))
    started = time.monotonic()
    with pytest.raises(ConnectionError) as raised:
        cluster.start_ray(EngineConfig(connect_timeout_seconds=0.5))
    assert time.monotonic() - started < seconds
    return str(raised.value)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_that_refuses_is_not_waited_for_without_end(monkeypatch, scheme):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{free.getsockname()[1]}"
    message = start_within(10, address, monkeypatch)
    assert f"RAY_ADDRESS={address}: no Ray cluster answers there within 0.5 s (Connection refused)" in message
    assert "unset it to compute on this machine" in message


def test_a_server_that_is_no_ray_is_not_waited_for_without_end(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        message = start_within(10, f"127.0.0.1:{silent.getsockname()[1]}", monkeypatch)
    assert "a service other than Ray listens there" in message


@pytest.mark.parametrize("address", ["10.0.0.1", "ray://head", "head:port", ":6379"])
def test_an_address_without_a_port_is_refused(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=r"expected HOST:PORT"):
        cluster.start_ray(EngineConfig())


def test_a_cluster_that_answers_is_joined(monkeypatch):
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    joined = []
    monkeypatch.setattr(cluster.ray, "init", lambda **arguments: joined.append(arguments))
    try:
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "auto", "provider://cluster"):
            monkeypatch.setenv("RAY_ADDRESS", address)
            cluster.start_ray(EngineConfig(connect_timeout_seconds=20))
    finally:
        server.stop(0)
    assert [one["address"] for one in joined] == [
        f"127.0.0.1:{port}",
        f"ray://127.0.0.1:{port}",
        "auto",
        "provider://cluster",
    ]
