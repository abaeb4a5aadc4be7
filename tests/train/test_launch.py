import os
import signal
import threading
import time

import pytest

from stages.contract.threads import DEFAULTS, USER_VARIABLES
from tests.tiny_run import environment
from tests.train.conftest import job_in
from tests.train.test_workers import assert_same_run
from train.checkpoints.folders import committed_steps
from train.loop import train
from train.preemption import StoppedError
from train.run_log import read_log


@pytest.mark.parametrize("shown", [False, True])
def test_errors_of_workers_are_reported_once_without_tracebacks(monkeypatch, shown):
    from ray.train import WorkerGroupError

    from train import launch

    monkeypatch.setenv("PTAFUSE_TRACEBACK", "1" if shown else "0")
    failures = {0: ValueError("model m: no good"), 1: ValueError("model m: no good"), 2: KeyError("x")}
    told = launch._reason(WorkerGroupError("Traceback (most recent call last):\n...", failures))
    if shown:
        assert "Traceback" in told
    else:
        assert told == "worker 0, 1: model m: no good; worker 2: 'x'"


@pytest.mark.ray
def test_ray_train_restarts_killed_workers_and_gives_what_the_plain_loop_gives(tiny_job, tmp_path):
    """Two workers; one is killed when the second step's checkpoint is committed."""
    import ray

    from train import launch

    train(job_in(tiny_job, tmp_path / "plain"))
    job = job_in(tiny_job, tmp_path / "ray", num_workers=2)
    faults = environment(PTAFUSE_FAULT=f"die:train:2:{tmp_path}")
    variables = {name: faults[name] for name in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PTAFUSE_FAULT")}
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": variables},
    )
    try:
        found = launch.run(job)
        again = launch.run(job)
    finally:
        ray.shutdown()
    assert (tmp_path / "die-train").exists()
    assert found.num_steps == 6
    assert not found.was_done
    assert again.was_done
    assert_same_run(tmp_path / "ray", tmp_path / "plain", relative=1e-4)


@pytest.mark.ray
def test_sigterm_to_the_driver_saves_and_stops_the_workers(tiny_job, tmp_path):
    import ray

    from train import launch

    job = job_in(tiny_job, tmp_path, num_epochs=2000, checkpoint_every_steps=100_000)

    def terminate() -> None:
        while not read_log(tmp_path):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    killer = threading.Thread(target=terminate)
    killer.start()
    try:
        with pytest.raises(StoppedError):
            launch.run(job)
    finally:
        killer.join()
        ray.shutdown()
    assert committed_steps(tmp_path) == [read_log(tmp_path)[-1].step]
    assert not (tmp_path / "manifest.json").exists()


def trainer_of(tiny_job, tmp_path, monkeypatch, *, num_gpus):
    from train import launch

    monkeypatch.setattr(launch.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(launch, "TorchTrainer", lambda function, **arguments: {"function": function, **arguments})
    return launch._trainer(job_in(tiny_job, tmp_path, num_workers=2), tmp_path, num_gpus)


def test_workers_with_gpus_use_nccl_and_compute_on_cuda_whatever_the_cluster_has_now(tiny_job, tmp_path, monkeypatch):
    trainer = trainer_of(tiny_job, tmp_path, monkeypatch, num_gpus=1)
    assert trainer["torch_config"].backend == "cpu:gloo,cuda:nccl"
    assert trainer["scaling_config"].resources_per_worker == {"CPU": 1, "GPU": 1}
    assert trainer["train_loop_config"]["job"].config.device == "cuda"
    without = trainer_of(tiny_job, tmp_path, monkeypatch, num_gpus=0)
    assert (without["torch_config"].backend, without["scaling_config"].use_gpu) == ("gloo", False)
    assert without["train_loop_config"]["job"].config.device == "cpu"


@pytest.mark.parametrize("setting", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_workers_start_with_the_command_s_wait_policy(tiny_job, tmp_path, monkeypatch, setting):
    for name in USER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in (setting or DEFAULTS).items():
        monkeypatch.setenv(name, value)
    trainer = trainer_of(tiny_job, tmp_path, monkeypatch, num_gpus=0)
    assert trainer["run_config"].worker_runtime_env == {"env_vars": setting or DEFAULTS}


def test_a_training_worker_without_its_reserved_gpu_trains_nothing(tiny_job, tmp_path, monkeypatch):
    from train import launch

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(launch, "train", lambda *_, **__: pytest.fail("it trains on CPUs"))
    settings = trainer_of(tiny_job, tmp_path, monkeypatch, num_gpus=1)["train_loop_config"]
    with pytest.raises(ValueError, match=r"train has a GPU reserved on .*, and torch sees no GPU there"):
        launch._train_worker(settings)


def test_a_url_is_refused_before_ray_starts(tiny_job):
    from dataclasses import replace

    import ray

    from train import launch

    with pytest.raises(ValueError, match="local folder"):
        launch.run(replace(tiny_job, output="s3://bucket/train"))
    assert not ray.is_initialized()
