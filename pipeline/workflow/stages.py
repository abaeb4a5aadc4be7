"""Run the stages of a configuration in their order."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pipeline.run.rollup import FiguresReader
from pipeline.run.specs import ShardedStage
from pipeline.run.stage_table import STAGES, stage_spec

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
    """Run every stage that a configuration has, in order; what is done is skipped.

    Raises:
        StageError: a stage did not finish; or no document is held out, or a text cannot be used, which is said before any
            model runs.
    """
    run_stages_before(run, "eval")
    run_named_stage(run, "eval")


def run_stages_before(run: "Run", stage: str) -> None:
    """Run the stages of a configuration that come before a stage, in order; what is done is skipped.

    Raises:
        StageError: a stage did not finish, or the stage is eval, and no document is held out or a text cannot be used.
    """
    for spec in STAGES:
        if spec.name == stage:
            break
        if spec.applies(run.config):
            run_named_stage(run, spec.name)
            if spec.name == "shard" and stage == "eval":
                _require_held_out(run)
                _require_texts(run)


def _require_held_out(run: "Run") -> None:
    """Refuse to train what could not be evaluated after it.

    Raises:
        StageError: no document is held out; says what to set.
    """
    from pipeline.run.session import StageError

    split = run.config.eval.split
    health = FiguresReader(run.store).read(run.resolved.steps["shard"].folder).health
    if health.get(f"{split}_segments") == 0:
        raise StageError(
            f"no document is held out, so nothing could be evaluated after training: raise shard.{split}_fraction, "
            f"which is {run.config.shard.fraction_of(split):g}, or give more documents (`ptafuse train --upstream` "
            "trains anyway)"
        )


def _require_texts(run: "Run") -> None:
    """Refuse to train what could not be evaluated on every text after it; see ``check_texts``."""
    if run.config.eval.texts:
        from pipeline.evaluation.eval_stage import check_texts

        check_texts(run)


def _train(run: "Run") -> None:
    from pipeline.engine.train_stage import run_training

    run_training(run)


def _evaluate(run: "Run") -> None:
    from pipeline.engine.model_task import run_with_model
    from pipeline.evaluation.eval_stage import run_eval
    from pipeline.evaluation.suites.run import run_suites

    run_eval(run, run_with_model)
    run_suites(run, run_with_model)


def _adapt(run: "Run") -> None:
    from pipeline.engine.adapt_stage import run_adapt

    run_adapt(run)


def _fit(run: "Run") -> None:
    from pipeline.engine.fit_stage import run_fit

    run_fit(run)


JOBS: Final[dict[str, Callable[["Run"], None]]] = {"adapt": _adapt, "fit": _fit, "train": _train, "eval": _evaluate}
"""Function that runs each stage that is not sharded; a test compares the keys with ``STAGES``."""
