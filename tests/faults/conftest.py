"""Processes that are made to die: forked from a server that has imported everything, so that each costs a second."""

import importlib
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.points import WRAPPED
from tests.tiny_run import ptafuse


class Ended(NamedTuple):
    """How a process ended; the code is negative for a signal."""

    code: int
    stderr: str


STAGE_MODULES = ("pipeline.engine.worker", "stages.contract.store")
"""What a sharded stage passes through: training, and its imports, are left out."""

StageProcess = Callable[..., Ended]


def _run_stage(config: str, run_url: str, stage: str, stderr: str, fault: str | None, file_size: int | None) -> None:
    """What the forked process does: one stage, in-process, with a fault or with a limit on the size of its files."""
    if fault:
        os.environ["PTAFUSE_FAULT"] = fault
        for name in STAGE_MODULES:
            WRAPPED[name](importlib.import_module(name))
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
    done = ptafuse(stage, config, "--run", run_url, "--local", check=False)
    Path(stderr).write_text(done.stderr)
    sys.exit(done.returncode)


class Undisturbed(NamedTuple):
    """A run that nothing disturbed: its configuration and its directory."""

    config: Path
    run: Path


@pytest.fixture(scope="session", params=["texts", "conversations"])
def undisturbed(request: pytest.FixtureRequest) -> Undisturbed:
    """What a disturbed run must end like, on texts and on conversations."""
    names = {"texts": ("tiny_config", "undisturbed_run"), "conversations": ("chat_config", "chat_run")}[request.param]
    return Undisturbed(*(request.getfixturevalue(name) for name in names))


@pytest.fixture(scope="session")
def forks() -> ForkServerContext:
    """Makes processes that have imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pipeline.cli.main", "pipeline.engine.worker", "transformers.activations", "tests.tiny_run"]
    )
    return context


@pytest.fixture(scope="session")
def stage_process(forks: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> StageProcess:
    """Run a stage in a process of its own."""
    folder = tmp_path_factory.mktemp("processes")

    def run(config: Path, run_url: str, stage: str, *, fault: str | None = None, file_size: int | None = None) -> Ended:
        stderr = folder / "stderr"
        stderr.write_text("")
        arguments = (str(config), run_url, stage, str(stderr), fault, file_size)
        process = forks.Process(target=_run_stage, args=arguments)
        process.start()
        process.join(timeout=120)
        assert process.exitcode is not None, "the process does not end"
        return Ended(process.exitcode, stderr.read_text())

    return run
