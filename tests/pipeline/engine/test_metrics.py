"""Our figures at Ray's Prometheus endpoint."""

import re
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.run.specs import Resources
from pipeline.settings.run import EngineConfig
from tests.pipeline.engine.test_worker import corpus_with_bad_line, job_for

DEADLINE_SECONDS = 60.0


@pytest.fixture
def metrics_url() -> Iterator[str]:
    """Provide a Ray in this process whose node exports metrics there."""
    import ray

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    system = {"metrics_report_interval_ms": 1000}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        _metrics_export_port=port, _system_config=system,
    )  # fmt: skip
    yield f"http://127.0.0.1:{port}/metrics"
    ray.shutdown()


def exported(url: str, name: str) -> dict[tuple[str, str], float]:
    """(stage, model) -> the counter's value."""
    with urllib.request.urlopen(url, timeout=5) as page:
        lines = [line for line in page.read().decode().splitlines() if line.startswith(f"ray_ptafuse_{name}_total{{")]
    found = {}
    for line in lines:
        labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
        found[labels["stage"], labels["model"]] = float(line.rsplit(" ", 1)[1])
    return found


@pytest.mark.slow
@pytest.mark.ray
def test_shards_tokens_and_failures_are_exported_by_stage_and_model(
    tiny_config: Path, tmp_path: Path, metrics_url: str
) -> None:
    from pipeline.engine.ray_runner import run_shards

    job, store = job_for(tiny_config, str(tmp_path / "good"))
    bad, _ = job_for(corpus_with_bad_line(tiny_config, tmp_path), str(tmp_path / "bad"))
    engine, resources = EngineConfig(), Resources(1, 1, 0)
    good = list(run_shards(job, [0, 1, 2], resources, engine))
    again = list(run_shards(job, [0], resources, engine))
    failed = list(run_shards(bad, [0], resources, engine))
    assert [status.outcome for status in (*good, *again, *failed)] == ["done"] * 3 + ["already done", "failed"]
    tokens = sum(manifest.num_tokens for manifest in store.manifests(job.step.folder).values())
    wanted = {"shards_done": 3.0, "tokens": float(tokens), "shards_failed": 1.0}
    deadline = time.monotonic() + DEADLINE_SECONDS
    found: dict[str, float | None] = {}
    while found != wanted and time.monotonic() < deadline:
        time.sleep(0.5)
        found = {name: exported(metrics_url, name).get(("shard", "")) for name in wanted}
    assert found == wanted
