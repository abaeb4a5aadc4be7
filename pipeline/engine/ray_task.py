"""Run a generator in a Ray task with its own resources; its values reach the driver one by one."""

from collections.abc import Callable, Iterator
from typing import Any, Final

import ray
import ray.exceptions

from pipeline.engine.cluster import require_resources, start_ray
from pipeline.settings.run import EngineConfig
from stages.contract.environment import DriverEnvironment

TASK_RETRIES: Final = 2
"""Number of retries: a task has three attempts, as many as a shard."""


def run_task(
    name: str,
    function: Callable[..., Iterator[Any]],
    arguments: tuple[Any, ...],
    *,
    cpus: float,
    gpus: Callable[[], float],
    engine: EngineConfig,
) -> Iterator[Any]:
    """Call a generator in a task, and yield its values without delay.

    Args:
        name: the task's name, for messages.
        function: the generator; called with the GPUs that the task has, then the arguments. After the death of its worker it
            is called again, from the beginning.
        arguments: arguments of the call; they are sent to another machine, so keep them small.
        cpus: CPUs that Ray reserves.
        gpus: returns the GPUs that Ray reserves; asked when the cluster is joined.
        engine: settings for starting Ray here, and whether the cluster can grow.

    Raises:
        ValueError: no machine has such CPUs and GPUs.
        RuntimeError: the task's worker died in every attempt.
    """
    start_ray(engine)
    reserved = gpus()
    require_resources(name, cpus, reserved, engine)
    task = ray.remote(num_cpus=cpus, num_gpus=reserved, max_retries=TASK_RETRIES, num_returns="streaming")(_call)
    try:
        for reference in task.options(name=name).remote(DriverEnvironment.here(), function, (reserved, *arguments)):
            yield ray.get(reference)
    except ray.exceptions.RayError as error:
        raise RuntimeError(
            f"{name}: Ray ended the task: {error}\nWhat is finished is kept; run the same command again."
        ) from error


def _call(
    environment: DriverEnvironment, function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]
) -> Iterator[Any]:
    environment.apply()
    # Not `yield from`: Ray sends values into a task's generator, which not every iterator takes.
    for value in function(*arguments):  # noqa: UP028
        yield value
