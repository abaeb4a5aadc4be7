import socket
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from pipeline.engine import ray_runner
from pipeline.settings.run import EngineConfig


def nodes(*resources: dict[str, float]):
    return lambda: (
        [{"Alive": True, "Resources": node} for node in resources] + [{"Alive": False, "Resources": {"CPU": 99}}]
    )


@pytest.mark.parametrize(
    ("cpus", "gpus", "count"),
    [(8, 0, 1), (4, 0, 4), (2, 1, 6), (0.5, 0, 30)],
)
def test_workers_that_fit_are_let_through(monkeypatch, cpus, gpus, count):
    monkeypatch.setattr(ray_runner.ray, "nodes", nodes({"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 2}))
    ray_runner.require_resources("train", cpus, gpus, count=count)


@pytest.mark.parametrize(("cpus", "gpus", "count"), [(9, 0, 1), (8, 0, 3), (2, 1, 7), (1, 5, 1)])
def test_workers_that_never_fit_are_refused_at_once(monkeypatch, cpus, gpus, count):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_runner.ray, "nodes", nodes({"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 2}))
    with pytest.raises(ValueError, match=f"{count} worker\\(s\\) at once, and there is room for"):
        ray_runner.require_resources("train", cpus, gpus, count=count)


def test_on_a_cluster_that_may_grow_it_is_a_warning(monkeypatch, caplog):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray_runner.ray, "nodes", nodes({"CPU": 8}))
    ray_runner.require_resources("train", 8, 1, count=2)
    assert "waiting for the cluster to grow" in caplog.text


def start_within(seconds, address, monkeypatch):
    """Join a cluster that is not there, with a limit of half a second."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray_runner.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_runner.ray, "init", lambda **_: pytest.fail("Ray would wait without end"))
    started = time.monotonic()
    with pytest.raises(ConnectionError) as raised:
        ray_runner.start_ray(EngineConfig(connect_timeout_seconds=0.5))
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
    assert "something listens there, and it does not speak Ray's protocol" in message


@pytest.mark.parametrize("address", ["10.0.0.1", "ray://head", "head:port", ":6379"])
def test_an_address_without_a_port_is_refused(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=r"expected HOST:PORT"):
        ray_runner.start_ray(EngineConfig())


def test_a_cluster_that_answers_is_joined(monkeypatch):
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    joined = []
    monkeypatch.setattr(ray_runner.ray, "init", lambda **arguments: joined.append(arguments))
    try:
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "auto", "provider://cluster"):
            monkeypatch.setenv("RAY_ADDRESS", address)
            ray_runner.start_ray(EngineConfig(connect_timeout_seconds=20))
    finally:
        server.stop(0)
    assert [one["address"] for one in joined] == [
        f"127.0.0.1:{port}",
        f"ray://127.0.0.1:{port}",
        "auto",
        "provider://cluster",
    ]
