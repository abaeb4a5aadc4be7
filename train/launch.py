"""The training loop under Ray Train: the one file that imports it.

Ray places the workers, gives each its CPUs and GPU, makes their process group, and starts all of them again when one
dies or its node is reclaimed. What has been done is read from the output folder alone (the newest committed checkpoint,
the manifest), never from Ray's own records, which register late. All nodes see the output folder.
"""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from stages.contract.environment import DriverEnvironment
from stages.contract.threads import wait_policy
from stages.contract.tracebacks import shows_tracebacks
from stages.models.devices import require_cuda
from train.job import MANIFEST, TrainJob, TrainResult
from train.loop import check_job, finished, train
from train.preemption import Notice, StoppedError, on_termination

logger = logging.getLogger(__name__)

STOP_REQUEST = "stop-requested"
"""The driver makes this file in the output folder when it gets SIGTERM; the first worker sees it after its step."""


def run(job: TrainJob, *, num_gpus: int = 0) -> TrainResult:
    """Train on a Ray cluster; the one that is initialised, else Ray's default.

    Args:
        job: what to do.
        num_gpus: GPUs of each worker, 0 or 1. With one a worker computes on it or fails, whatever ``train.device`` says.

    Raises:
        ValueError: the job's settings or output folder do not fit.
        RuntimeError: the workers failed more than ``max_failures`` times; says why.
        StoppedError: this process got SIGTERM; the workers wrote a checkpoint and stopped.
    """
    output = check_job(job, num_workers=job.config.num_workers)
    done = finished(job)
    if done is not None:
        logger.info("train %s: nothing to do, %s is finished", job.fingerprint, done.model_folder)
        return done
    output.mkdir(parents=True, exist_ok=True)
    (output / STOP_REQUEST).unlink(missing_ok=True)
    try:
        with on_termination((output / STOP_REQUEST).touch):
            _trainer(job, output, num_gpus).fit()
    except ray.train.TrainingFailedError as error:
        raise RuntimeError(_reason(error)) from error
    result = finished(job)
    if result is not None:
        return replace(result, was_done=False)
    if (output / STOP_REQUEST).exists():
        raise StoppedError("stopped on SIGTERM; the checkpoint of the last step is written")
    raise RuntimeError(f"Ray Train ended without an error, but {output}/{MANIFEST} is not there")


def _reason(error: ray.train.TrainingFailedError) -> str:
    """Return what the workers said, each thing once; Ray's own message holds their tracebacks."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    if shows_tracebacks() or not failures:
        return str(error)
    said: dict[str, list[int]] = {}
    for rank, failure in sorted(failures.items()):
        said.setdefault(str(failure).strip() or type(failure).__name__, []).append(rank)
    return "; ".join(f"worker {', '.join(map(str, ranks))}: {message}" for message, ranks in said.items())


def _trainer(job: TrainJob, output: Path, num_gpus: int) -> TorchTrainer:
    if not ray.is_initialized():
        ray.init()
    device = "cuda" if num_gpus else "cpu"  # Ray hides the GPUs of a machine from a worker that reserves none
    job = replace(job, config=job.config.model_copy(update={"device": device}))
    return TorchTrainer(
        _train_worker,
        train_loop_config={"job": job, "environment": DriverEnvironment.here()},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if num_gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.config.num_workers,
            use_gpu=bool(num_gpus),
            resources_per_worker={"CPU": job.config.cpus_per_worker, **({"GPU": num_gpus} if num_gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name=f"ptafuse-{job.fingerprint}",
            storage_path=str((output / "ray").resolve()),
            failure_config=ray.train.FailureConfig(max_failures=job.config.max_failures),
            # Ray's workers import torch before they import this package, which sets these variables otherwise.
            worker_runtime_env={"env_vars": wait_policy(os.environ)},
        ),
    )


def _train_worker(settings: dict[str, Any]) -> None:
    """Train in one Ray worker.

    Steps are not reported to Ray: a report waits until the controller polls, up to one second each, and nobody reads them
    there; they are in the run's own logs.
    """
    settings["environment"].apply()
    job: TrainJob = settings["job"]
    if job.config.device == "cuda":
        require_cuda("train")
    request = Path(job.output) / STOP_REQUEST

    def watch() -> Notice:
        # Ray shares the first worker's answer among all, so each must ask as often as the others do.
        reclaimed = ray.train.get_preemption_info() is not None
        if request.exists():
            return Notice.STOP
        return Notice.SAVE if reclaimed else Notice.NONE

    try:
        train(job, watch=watch)
    except StoppedError as stopped:  # as asked: no failure, which Ray would start again
        logger.info("%s", stopped)
