"""The stages in their order, and how each is run."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.run.session import Run


def run_named_stage(run: "Run", stage: str) -> None:
    """Run one stage by its name, the sharded ones and train and eval alike."""
    if stage == "train":
        from pipeline.engine.train_stage import run_training

        run_training(run)
    elif stage == "eval":
        from pipeline.evaluation.eval_stage import run_eval
        from pipeline.evaluation.suites.run import run_suites

        run_eval(run)
        run_suites(run)
    else:
        from pipeline.engine.sharded_stage import run_stage

        run_stage(run, stage)


def run_all_stages(run: "Run") -> None:
    """Run every stage of a configuration, in order."""
    for stage in STAGE_HELP:
        run_named_stage(run, stage)


STAGE_HELP = {
    "shard": "Cut the dataset into frozen shards of segments that fit every tokenizer.",
    "logits": "Run each model over every shard and keep the top-k logprobs of every position.",
    "align": "Pair each source's tokens with the target's, and move its distributions into the target's vocabulary.",
    "fuse": "Choose or mix the candidate distributions at each position, and pack segments into training blocks.",
    "train": "Train the target on the gold tokens and the fused distributions; goes on from the newest checkpoint.",
    "eval": "Bits per byte on held-out text: the target before and after, each source, and baselines; benchmarks on request.",
}
"""The stages in their order."""
