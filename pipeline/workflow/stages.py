"""Run the stages of a configuration in their order."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pipeline.run.stage_table import STAGES, ShardedStage, stage_spec

if TYPE_CHECKING:
    from pipeline.run.session import Run


def run_named_stage(run: "Run", stage: str) -> None:
    """Run one stage by its name."""
    if isinstance(stage_spec(stage), ShardedStage):
        from pipeline.engine.sharded_stage import run_stage

        run_stage(run, stage)
    else:
        JOBS[stage](run)


def run_all_stages(run: "Run") -> None:
    """Run every stage that a configuration has, in order."""
    for spec in STAGES:
        if spec.applies(run.config):
            run_named_stage(run, spec.name)


def run_stages_before(run: "Run", stage: str) -> None:
    """Run the stages of a configuration that come before a stage, in order."""
    for spec in STAGES:
        if spec.name == stage:
            break
        if spec.applies(run.config):
            run_named_stage(run, spec.name)


def _train(run: "Run") -> None:
    from pipeline.engine.train_stage import run_training

    run_training(run)


def _evaluate(run: "Run") -> None:
    from pipeline.evaluation.eval_stage import run_eval
    from pipeline.evaluation.suites.run import run_suites

    run_eval(run)
    run_suites(run)


def _adapt(run: "Run") -> None:
    from pipeline.engine.adapt_stage import run_adapt

    run_adapt(run)


def _fit(run: "Run") -> None:
    from pipeline.engine.fit_stage import run_fit

    run_fit(run)


JOBS: Final[dict[str, Callable[["Run"], None]]] = {"adapt": _adapt, "fit": _fit, "train": _train, "eval": _evaluate}
"""How each stage that is not sharded is run; a test compares the keys with ``STAGES``."""
