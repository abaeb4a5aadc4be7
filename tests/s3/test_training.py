"""Training on machines that share no disk, with the run in an object store: each worker has an output folder of its own."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from stages.contract.store import Store
from tests.s3.servers import S3Server
from tests.train.conftest import job_in, tiny_job, tiny_model  # noqa: F401 - fixtures
from tests.train.test_workers import assert_same_run
from tests.train.workers import kill, printed, start_workers, train_on, wait_until
from train.checkpoints.checkpoint import COMMITTED, committed_steps
from train.job import FusedFile, TrainJob
from train.loop import train

pytestmark = [pytest.mark.s3, pytest.mark.slow]


def remote_job(job: TrainJob, url: str) -> TrainJob:
    """The job with its files, its checkpoints and its model in an object store."""
    store = Store(url)
    for file in job.files:
        store.upload(f"fuse/{Path(file.path).name}", Path(file.path))
    files = tuple(FusedFile(f"{url}/fuse/{Path(file.path).name}", file.sha256) for file in job.files)
    return replace(job, files=files, checkpoint_store=f"{url}/train")


def copied_steps(url: str) -> list[int]:
    store = Store(f"{url}/train")
    names = [name for name in store.names("") if store.exists(f"{name}/{COMMITTED}")]
    return [int(name.removeprefix("checkpoint-")) for name in names]


def test_machines_without_a_shared_disk_train_are_killed_and_go_on(
    s3_client: S3Server,
    run_url: str,
    tiny_job: TrainJob,  # noqa: F811
    tmp_path: Path,
) -> None:
    train(job_in(tiny_job, tmp_path / "plain"))
    job = remote_job(job_in(tiny_job, tmp_path / "unused"), run_url)
    nodes = [tmp_path / "node-0", tmp_path / "node-1"]
    processes = start_workers(job, tmp_path / "before", num_workers=2, pause_after=3, pause_seconds=600, outputs=nodes)
    wait_until(lambda: all(list(node.glob("paused-*")) for node in nodes), processes, seconds=300)
    wait_until(lambda: copied_steps(run_url) == [2], processes, seconds=300)
    kill(processes)
    for rank, node in enumerate(nodes):
        assert committed_steps(node) == [], "a machine has no whole checkpoint"
        (folder,) = node.glob("checkpoint-*")
        assert [path.name for path in folder.glob("*.distcp")] == [f"__{rank}_0.distcp"]
    copy = json.loads(Store(f"{run_url}/train/checkpoint-000002").read(COMMITTED))["files"]
    assert sorted(copy) == [".metadata", "__0_0.distcp", "__1_0.distcp", "log.jsonl", "state.json"]

    shutil.rmtree(nodes[0])  # the first machine is lost with its disk
    nodes[0] = tmp_path / "node-2"
    train_on(job, tmp_path / "after", num_workers=2, outputs=nodes, seconds=300)
    assert "2 of 6 steps done" in printed(tmp_path / "after")
    assert_same_run(nodes[0], tmp_path / "plain", relative=1e-4)
    store = Store(f"{run_url}/train")
    manifest = json.loads(store.read("manifest.json"))
    assert manifest["result"]["num_steps"] == 6
    assert all(store.exists(f"model/{name}") for name in manifest["model_files"])
    assert store.read("log.jsonl") == (nodes[0] / "log.jsonl").read_bytes()
    assert copied_steps(run_url) == [4, 6]
    assert not list(tmp_path.glob("node-*/fused")), "what was fetched goes when the model is finished"

    train_on(job, tmp_path / "again", num_workers=2, outputs=nodes, seconds=300)
    assert "step 1/6" not in printed(tmp_path / "again")
    assert f"nothing to do, {nodes[0]}/model is finished" in printed(tmp_path / "again")


def test_another_number_of_machines_goes_on_from_the_copies(
    s3_client: S3Server,
    run_url: str,
    tiny_job: TrainJob,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Two machines, then one alone, then two others; a checkpoint whose last upload failed is passed over."""
    train(job_in(tiny_job, tmp_path / "plain"))
    job = remote_job(job_in(tiny_job, tmp_path / "unused"), run_url)
    nodes = [tmp_path / f"node-{number}" for number in range(5)]
    for step, outputs in ((2, nodes[:2]), (4, nodes[2:3])):
        folder = tmp_path / f"until-{step}"
        processes = start_workers(
            job, folder, num_workers=len(outputs), pause_after=step + 1, pause_seconds=600, outputs=outputs
        )
        wait_until(lambda step=step: step in copied_steps(run_url), processes, seconds=300)
        kill(processes)
    store = Store(f"{run_url}/train")
    torn = json.loads(store.read(f"checkpoint-000004/{COMMITTED}"))["files"]
    store.delete("checkpoint-000004/__0_0.distcp")
    assert "__0_0.distcp" in torn
    train_on(job, tmp_path / "after", num_workers=2, outputs=nodes[3:], seconds=300)
    shown = printed(tmp_path / "after")
    assert "the copy of step 4 cannot be used: __0_0.distcp is missing" in shown
    assert "2 of 6 steps done" in shown
    assert_same_run(nodes[3], tmp_path / "plain", relative=1e-4)
