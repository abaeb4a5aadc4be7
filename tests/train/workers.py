"""Several workers of one training job, as processes under a gloo group: what ``torchrun`` would start."""

import logging
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

from train.job import StepRecord, TrainJob
from train.loop import train

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["train.loop", "transformers.models.llama", "transformers.models.gemma3"])
"""Workers fork from a process that has imported what they need, which takes seconds: so they start at once."""


def start_workers(
    job: TrainJob,
    folder: Path,
    *,
    num_workers: int,
    pause_after: int = 0,
    pause_seconds: float = 60,
    outputs: Sequence[Path] = (),
) -> list[BaseProcess]:
    """Start the workers of a job; each writes to ``<folder>/worker-<rank>.txt``.

    Args:
        job: what they train.
        folder: for what they print.
        num_workers: how many; one runs without a process group of its own.
        pause_after: a step after which each waits, having made ``<output>/paused-<rank>``.
        pause_seconds: how long.
        outputs: each worker's own output folder, as on machines of which each has a disk of its own; by default all have
            the job's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(num_workers):
        # The server that workers fork from has the environment of the first test, and S3 servers come later.
        aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        variables = {"OMP_NUM_THREADS": "1", **aws}
        if num_workers > 1:
            variables |= {"RANK": str(rank), "WORLD_SIZE": str(num_workers), "LOCAL_RANK": str(rank)}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        output = folder / f"worker-{rank}.txt"
        mine = replace(job, output=str(outputs[rank])) if outputs else job
        process = _CONTEXT.Process(target=_work, args=(mine, output, variables, rank, pause_after, pause_seconds))
        process.start()
        processes.append(process)
    return processes


def _work(
    job: TrainJob, output: Path, variables: dict[str, str], rank: int, pause_after: int, pause_seconds: float
) -> None:
    os.environ.update(variables)
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    logging.basicConfig(level=logging.INFO, force=True)

    def on_step(record: StepRecord) -> None:
        if record.step == pause_after:
            (Path(job.output) / f"paused-{rank}").touch()
            time.sleep(pause_seconds)

    train(job, on_step=on_step)


def wait(processes: Sequence[BaseProcess], *, seconds: float = 60) -> list[int | None]:
    """Their exit codes; None for one that takes longer, which is killed."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    kill(processes)
    return codes


def kill(processes: Sequence[BaseProcess]) -> None:
    """SIGKILL those that are there."""
    for process in processes:
        process.kill()
        process.join()


def train_on(
    job: TrainJob, folder: Path, *, num_workers: int, outputs: Sequence[Path] = (), seconds: float = 60
) -> None:
    """Train a job to its end."""
    codes = wait(start_workers(job, folder, num_workers=num_workers, outputs=outputs), seconds=seconds)
    if any(code != 0 for code in codes):  # None: it took longer
        raise AssertionError(f"exit codes {codes}, None after {seconds} s:\n{printed(folder)}")


def wait_until(condition: Callable[[], bool], processes: Sequence[BaseProcess], *, seconds: float = 180) -> None:
    """Return when something has come about that these processes do."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end or all(process.exitcode is not None for process in processes):
            kill(processes)
            raise AssertionError("it did not come about")
        time.sleep(0.02)


def printed(folder: Path) -> str:
    """What the workers wrote."""
    return "\n".join(path.read_text() for path in sorted(folder.glob("worker-*.txt")))
