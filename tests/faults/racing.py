"""Two attempts at one shard, brought to the point where both are about to publish."""

import threading
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.engine.worker import ShardJob, ShardStatus, ShardWorker
from pipeline.run.session import Run, open_run
from pipeline.run.shard_plan import freeze_plan
from pipeline.run.steps import Request
from stages.contract.store import Store


def race(config: Path, run_url: str, patch: pytest.MonkeyPatch) -> tuple[Run, list[ShardStatus]]:
    """Two workers compute shard 0 of the first stage; both have written their data before either publishes."""
    run = open_run(Request(str(config)), run_url, Console(quiet=True), local=True)
    plan = freeze_plan(run.resolved, run.store)
    step = run.resolved.steps["shard"]
    jobs = [
        ShardJob(
            run_url=run_url,
            config_json=run.config.model_dump_json(by_alias=True),
            step=step,
            input_folders={},
            shard_folder=step.folder,
            num_shards=plan.num_shards,
            launch=launch,
            max_attempts=3,
        )
        for launch in ("one", "two")
    ]
    meet = threading.Barrier(2)
    if run.store.is_local:
        before, name = Store.create, "create"
    else:
        before, name = Store.exists, "exists"  # both look whether there is one before either writes

    def wait_for_the_other(self: Store, key: str, *arguments: bytes):
        found = before(self, key, *arguments) if name == "exists" else None
        if "/manifests/" in key:
            meet.wait(timeout=60)
        return found if name == "exists" else before(self, key, *arguments)

    patch.setattr(Store, name, wait_for_the_other)
    found: list[ShardStatus] = []
    threads = [threading.Thread(target=lambda job=job: found.append(ShardWorker(job).run(0))) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return run, found
