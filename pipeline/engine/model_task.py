"""Work that loads one model, where the run computes: in a Ray task with a GPU, or in this process with ``--local``.

The driver may be a head node with little memory and without a GPU. So work that loads a model runs where there is room
for it, like the shards and the training.
"""

import builtins
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console

from pipeline.run.session import Run
from pipeline.run.steps import ResolvedRun
from pipeline.settings.run import RunConfig
from stages.contract.store import Store
from stages.contract.tracebacks import VARIABLE, shows_tracebacks

_KINDS: Final = (FileNotFoundError, OSError, ValueError, ImportError, FloatingPointError, RuntimeError)
"""Classes of errors whose messages were written for people; each can be built from one text."""


@dataclass(frozen=True)
class _Failure:
    """An error of a task, as text: an exception of a library may not survive the way between two processes.

    Attributes:
        kind: name of one of ``_KINDS``.
        message: text of the error.
    """

    kind: str
    message: str


def run_with_model(run: Run, name: str, work: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
    """Call a generator that loads a model, and yield its values without delay.

    On Ray it is a task with ``eval.cpus_per_worker`` CPUs, and with a GPU where ``eval.device`` asks for one.

    Args:
        run: the run.
        name: name of the work, for messages.
        work: the generator; called with the run, whose console is silent in another process, and the arguments.
        *arguments: arguments of the call; small, and valid in another process.

    Raises:
        ValueError: no machine of the cluster has the CPUs and GPUs of a task.
        RuntimeError: the task's worker died in every attempt; or as the work itself says.
    """
    if run.local:
        yield from work(run, *arguments)
        return
    from pipeline.engine import ray_task  # Ray takes seconds to import: only where something is to be computed

    url = run.store.path("").rstrip("/") if run.store.is_local else run.store.url
    values = ray_task.run_task(
        name,
        _in_task,
        (name, run.resolved, url, work, arguments),
        cpus=run.config.eval_cpus,
        gpus=lambda: _num_gpus(run.config),
        engine=run.config.engine,
    )
    for value in values:
        if isinstance(value, _Failure):
            raise getattr(builtins, value.kind)(value.message)
        yield value


def _num_gpus(config: RunConfig) -> float:
    """Return the GPUs that a task reserves, once the cluster is joined.

    Raises:
        ValueError: neither ``eval`` nor ``train`` says whether models are on GPUs, and the cluster may grow.
    """
    from pipeline.engine.cluster import can_grow, gpus_per_worker

    device, configured = config.eval.device, None
    if device == "auto" and can_grow(config.engine):
        # The machines that are alive say nothing. The model was trained just before: it is evaluated on what it was
        # trained on, so that a run does not end here after all of its hours.
        device, configured = config.train.device, config.train.gpus_per_worker
    return gpus_per_worker(configured, device, config.engine, section="eval")


def _in_task(
    num_gpus: float,
    name: str,
    resolved: ResolvedRun,
    url: str,
    work: Callable[..., Iterator[Any]],
    arguments: tuple[Any, ...],
) -> Iterator[Any]:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        if num_gpus:
            _require_cuda(name)
        yield from work(Run(resolved, Store(url), Console(quiet=True), local=True), *arguments)
    # The boundary between two processes. Raised here, an error would arrive inside Ray's tracebacks.
    except Exception as error:
        if shows_tracebacks():
            raise
        yield _failure(error)


def _require_cuda(name: str) -> None:
    from stages.models.devices import require_cuda  # torch takes seconds to import

    require_cuda(name)


def _failure(error: Exception) -> _Failure:
    kind = next((kind for kind in _KINDS if isinstance(error, kind)), None)
    if kind is None:
        return _Failure("RuntimeError", f"{type(error).__name__}: {error}. {VARIABLE}=1 shows where it comes from")
    return _Failure(kind.__name__, str(error))
