"""The training loop under Ray Train: the one file that imports it.

Ray places the workers, gives each its CPUs and GPU, makes their process group, and starts all of them again when one
dies or its node is reclaimed. Progress is read only from the output folder or the object store (the newest
committed checkpoint, the manifest), never from Ray's own records, which register late. All nodes see the output folder,
or the run is in an object store.
"""

import logging
import os
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.actor import ActorHandle
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stages.contract.environment import DriverEnvironment
from stages.contract.threads import wait_policy
from stages.contract.tracebacks import shows_tracebacks
from stages.models.devices import require_cuda
from train.checkpoints.disks import appears
from train.job import MANIFEST, StepRecord, TrainJob, TrainResult
from train.loop import check_job, finished, train
from train.model.publish import publish_model, read_published
from train.preemption import Notice, StoppedError, on_termination
from train.run_log import RunLog

logger = logging.getLogger(__name__)

STOP_REQUEST = "stop-requested"
"""File that the driver creates in the output folder on SIGTERM; the first worker sees it after its step."""
DESK_SECONDS = 30.0
"""How long the first worker waits for an answer of the driver's machine."""


def run(job: TrainJob, *, num_gpus: int = 0) -> TrainResult:
    """Train on a Ray cluster; the one that is initialised, else Ray's default.

    Args:
        job: job to run.
        num_gpus: GPUs of each worker, 0 or 1. With one a worker computes on it or fails, whatever ``train.device`` says.

    Raises:
        ValueError: the job's settings or output folder do not fit.
        RuntimeError: the workers failed more than ``max_failures`` times; says why.
        StoppedError: this process got SIGTERM; the workers wrote a checkpoint and stopped.
    """
    output = check_job(job, num_workers=job.config.num_workers)
    done = _finished(job)
    if done is not None:
        logger.info("train %s: nothing to do, %s is finished", job.fingerprint, done.model_folder)
        return done
    output.mkdir(parents=True, exist_ok=True)
    (output / STOP_REQUEST).unlink(missing_ok=True)
    marker = f".started-{uuid.uuid4().hex[:12]}"
    (output / marker).touch()
    if not ray.is_initialized():
        ray.init()
    desk = None if job.checkpoint_store is None else _start_desk(output)
    try:
        with on_termination((output / STOP_REQUEST).touch):
            _trainer(job, output, num_gpus, marker=marker, desk=desk).fit()
    except ray.train.TrainingFailedError as error:
        raise RuntimeError(_reason(error)) from error
    finally:
        (output / marker).unlink(missing_ok=True)
        if desk is not None:
            ray.kill(desk)
    result = _finished(job)
    if result is not None:
        return replace(result, was_done=False)
    if (output / STOP_REQUEST).exists():
        raise StoppedError("stopped on SIGTERM; the checkpoint of the last step is written")
    where = str(output) if job.checkpoint_store is None else job.checkpoint_store
    raise RuntimeError(f"Ray Train finished without an error, but {where}/{MANIFEST} is missing")


def _finished(job: TrainJob) -> TrainResult | None:
    """Return the result of a finished job: its model is on this machine, or in the object store."""
    done = finished(job)
    if job.checkpoint_store is None:
        return done
    if done is not None:  # perhaps it was killed while it was uploaded
        publish_model(Path(job.output), job.checkpoint_store)
        return done
    manifest = read_published(job.checkpoint_store)
    if manifest is None:
        return None
    return TrainResult(model_folder=f"{job.checkpoint_store}/model", was_done=True, **manifest["result"])


class _Desk:
    """An actor on the driver's machine, for workers that do not see its disk: the log that is shown, and SIGTERM."""

    def __init__(self, output: str) -> None:
        self._output = Path(output)
        self._log: RunLog | None = None

    def add(self, record: StepRecord) -> None:
        """Log a step; where training went back to a checkpoint, the log does too."""
        if self._log is None or self._log.last is None or record.step <= self._log.last.step:
            self.close()
            self._log = RunLog(self._output, step=record.step - 1)
        self._log.add(record)

    def is_stop_requested(self) -> bool:
        """Return whether the driver got SIGTERM."""
        return (self._output / STOP_REQUEST).exists()

    def close(self) -> None:
        """Return when all that was added is on disk."""
        if self._log is not None:
            self._log.__exit__(None, None, None)
            self._log = None


def _start_desk(output: Path) -> ActorHandle:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(_Desk).options(num_cpus=0, scheduling_strategy=here).remote(str(output.resolve()))


def _reason(error: ray.train.TrainingFailedError) -> str:
    """Return what the workers said, each thing once; Ray's own message holds their tracebacks."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    if shows_tracebacks() or not failures:
        return str(error)
    said: dict[str, list[int]] = {}
    for rank, failure in sorted(failures.items()):
        said.setdefault(str(failure).strip() or type(failure).__name__, []).append(rank)
    return "; ".join(f"worker {', '.join(map(str, ranks))}: {message}" for message, ranks in said.items())


def _trainer(
    job: TrainJob, output: Path, num_gpus: int, *, marker: str | None = None, desk: ActorHandle | None = None
) -> TorchTrainer:
    device = "cuda" if num_gpus else "cpu"  # Ray hides the GPUs of a machine from a worker that reserves none
    job = replace(job, config=job.config.model_copy(update={"device": device}))
    return TorchTrainer(
        _train_worker,
        train_loop_config={"job": job, "environment": DriverEnvironment.here(), "marker": marker, "desk": desk},
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
    output, marker = Path(job.output), settings["marker"]
    request = output / STOP_REQUEST
    desk = None
    if ray.train.get_context().get_world_rank() == 0 and settings["desk"] is not None:
        desk = None if appears(output / marker, waits=True) else settings["desk"]

    def watch() -> Notice:
        # Ray shares the first worker's answer among all, so each must ask as often as the others do.
        reclaimed = ray.train.get_preemption_info() is not None
        if request.exists() or (desk is not None and _is_stop_requested(desk)):
            return Notice.STOP
        return Notice.SAVE if reclaimed else Notice.NONE

    def show(record: StepRecord) -> None:
        if desk is not None:
            desk.add.remote(record)

    try:
        train(job, watch=watch, on_step=show, marker=marker)
    except StoppedError as stopped:  # as asked: no failure, which Ray would start again
        logger.info("%s", stopped)
    finally:
        if desk is not None:
            _ask(desk.close.remote())


def _is_stop_requested(desk: ActorHandle) -> bool:
    return bool(_ask(desk.is_stop_requested.remote()))


def _ask(answer: "ray.ObjectRef[Any]") -> Any:
    """Return what the driver's machine answers; None where it does not: the job's end must not hang on it."""
    try:
        return ray.get(answer, timeout=DESK_SECONDS)
    except ray.exceptions.RayError as error:
        logger.warning("the machine that started this training does not answer: %s", error)
        return None
