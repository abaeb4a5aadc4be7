"""The object store goes away in the middle of a stage, and comes back."""

from pathlib import Path

import pytest

from stages.contract import filesystem
from tests.s3.conftest import use
from tests.s3.proxy import Fault, FaultyProxy
from tests.s3.servers import S3Server
from tests.tiny_run import NUM_DOCUMENTS, ptafuse, status

pytestmark = [pytest.mark.s3, pytest.mark.slow]


def test_outage_ends_the_command_and_costs_no_attempt(
    s3_client: S3Server, run_url: str, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "RETRY_SECONDS", 0.5)
    is_away = [False]

    def choose(method: str, path: str) -> Fault | None:
        is_away[0] |= method == "PUT" and "/data/shard-00002" in path
        return "drop" if is_away[0] else None

    with FaultyProxy(s3_client.port, choose) as proxy:
        use(proxy.endpoint, monkeypatch)
        arguments = ("shard", str(tiny_config), "--run", run_url, "--local")
        ended = ptafuse(*arguments, check=False)
        assert ended.returncode == 1
        assert f"ptafuse: {run_url}: no useful answer for" in ended.stderr
        assert "then run the same command again: finished shards are kept" in ended.stderr
        proxy.choose = lambda *_: None
        shards = status(run_url)["shard"]["shards"]
        assert [shard["state"] for shard in shards][:4] == [
            "done",
            "done",
            "running",
            "pending",
        ]  # by status: its process, which is ours, still lives
        ptafuse(*arguments)
    shards = status(run_url)["shard"]["shards"]
    assert [shard["state"] for shard in shards] == ["done"] * (NUM_DOCUMENTS // 4)
    assert [shard["attempts"] for shard in shards][:4] == [1, 1, 2, 1]
