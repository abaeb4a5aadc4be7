"""Two attempts at one shard in an object store, with and without conditional create: one manifest, and its rows are there."""

from pathlib import Path

import pytest

from pipeline.state.verify import verify_run
from tests.faults.racing import race
from tests.s3.servers import S3Server

pytestmark = [pytest.mark.s3, pytest.mark.slow]


def test_two_attempts_race(
    s3_client: S3Server, run_url: str, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, found = race(tiny_config, run_url, monkeypatch)
    folder = run.resolved.steps["shard"].folder
    manifest = run.store.read_manifest(folder, 0)
    assert manifest is not None
    assert "done" in {status.outcome for status in found}
    assert len(run.store.names(f"{folder}/data")) == 2, "in an object store the loser's rows are left to `ptafuse gc`"
    assert run.store.read_table(manifest.data, remake="").num_rows == manifest.num_rows_out
    assert verify_run(run.store, run.console, repair=False) == 0
    if s3_client.kind == "moto":
        assert sorted(status.outcome for status in found) == ["already done", "done"]
