"""Training on machines that share no disk, with the run in an object store: each worker has an output folder of its own."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.run.records import recorded_run
from stages.contract.store import Store
from tests.s3.servers import S3Server
from tests.tiny_run import REPOSITORY, environment, ptafuse
from tests.train.conftest import job_in, tiny_job, tiny_model  # noqa: F401 - fixtures
from tests.train.test_loop import weights
from tests.train.test_workers import assert_same_run
from tests.train.workers import kill, printed, start_workers, train_on, wait_until
from train.checkpoints.folders import COMMITTED, committed_steps
from train.job import FusedFile, StepRecord, TrainJob
from train.loop import train
from train.run_log import read_log

pytestmark = [pytest.mark.s3, pytest.mark.slow]


def remote_job(job: TrainJob, url: str) -> TrainJob:
    """Return the job with its files, its checkpoints and its model in an object store."""
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
    for name in ("fused", "checkpoint-*"):
        assert not list(tmp_path.glob(f"node-[12]/{name}")), "what is not needed any more goes from each machine's disk"

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


@pytest.mark.ray
def test_ray_trains_on_machines_without_a_shared_disk_and_one_is_lost(
    s3_client: S3Server, run_url: str, tiny_config: Path, undisturbed_run: Path, tmp_path: Path
) -> None:
    """Two nodes train, one is killed when a checkpoint is committed, another joins; the driver's node trains nothing."""
    toml = tmp_path / "remote.toml"
    toml.write_text(f'{tiny_config.read_text()}scratch = "{tmp_path}/scratch"\n')
    ptafuse("fuse", str(toml), "--run", run_url, "--local", "--upstream")
    script = [sys.executable, "-m", "tests.s3.two_machines", str(toml), run_url, str(tmp_path)]
    env = environment(PTAFUSE_FAULT=f"block@data:train:2:{tmp_path}")
    done = subprocess.run(script, check=False, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert (tmp_path / "node-killed").exists()

    # The trained run is that of one process on a local disk: steps, losses, weights.
    store = Store(run_url)
    folder = recorded_run(store).steps["train"].folder
    there = undisturbed_run / folder
    expected = read_log(there)
    found = [StepRecord(**json.loads(line)) for line in store.read(f"{folder}/log.jsonl").splitlines()]
    assert [(record.step, record.blocks) for record in found] == [(record.step, record.blocks) for record in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
    for name in json.loads(store.read(f"{folder}/manifest.json"))["model_files"]:
        store.download(f"{folder}/model/{name}", tmp_path / "model" / name)
    last = weights(str(there / "model"))
    for name, value in weights(str(tmp_path / "model")).items():
        assert (value - last[name]).abs().mean() < 1e-5, name

    # The driver saw none of it on its own disk, and showed every step.
    folders = [path for path in tmp_path.glob("scratch/*/train/*") if path.is_dir()]
    assert len(folders) == 4, "the driver's, and one for each node that trained"
    assert f"train: step {expected[-1].step}/{expected[-1].num_steps}" in done.stdout
    assert f"train: the model is at {run_url}/{folder}/model" in done.stdout
    policies = [path.read_text() for path in tmp_path.glob("scratch/*/train/*/wait-policy.txt")]
    assert len(policies) == 3
    assert all("('OMP_WAIT_POLICY', 'PASSIVE')" in policy for policy in policies)
