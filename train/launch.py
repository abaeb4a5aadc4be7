"""The training loop under Ray Train: the one file that imports it.

Ray places the process, gives it its CPUs and GPU, and starts it again when it dies. What has been done is read from the
output folder alone (the newest committed checkpoint, the manifest), never from Ray's own records, which register late.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer

from stages.contract.devices import resolve_device
from train.job import TrainJob, TrainResult
from train.loop import check_job, finished, train

logger = logging.getLogger(__name__)


def run(job: TrainJob) -> TrainResult:
    """Train on a Ray cluster; the one that is initialised, else Ray's default.

    Raises:
        ValueError: the job's settings or output folder do not fit.
        RuntimeError: the training process failed more than ``max_failures`` times; says why.
    """
    output = check_job(job)
    done = finished(job)
    if done is not None:
        logger.info("train %s: nothing to do, %s is finished", job.fingerprint, done.model_folder)
        return done
    use_gpu = resolve_device(job.config.device).type == "cuda"
    resources = {"CPU": job.config.cpus_per_worker, **({"GPU": 1.0} if use_gpu else {})}
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(num_workers=1, use_gpu=use_gpu, resources_per_worker=resources),
        run_config=ray.train.RunConfig(
            name=f"ptafuse-{job.fingerprint}",
            storage_path=str((output / "ray").resolve()),
            failure_config=ray.train.FailureConfig(max_failures=job.config.max_failures),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise RuntimeError(str(error)) from error
    result = finished(job)
    if result is None:
        raise RuntimeError(f"Ray Train ended without an error, but {Path(job.output)}/manifest.json is not there")
    return replace(result, was_done=False)


def _train_worker(settings: dict[str, Any]) -> None:
    """What runs in the Ray worker.

    Steps are not reported to Ray: a report waits until the controller polls, up to a second each, and nobody reads them
    there; they are in the run's own logs.
    """
    train(settings["job"])
