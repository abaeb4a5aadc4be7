import pytest

from pipeline.engine import ray_runner


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
