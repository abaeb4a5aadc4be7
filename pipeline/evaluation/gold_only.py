"""Find the run that "against gold only" compares a trained model with: the same training on gold tokens only.

Of two runs whose loss has no part for the fused distributions, the trained models are the same if they agree in

- the target: its weights and its tokenizer;
- the training blocks, which are the gold tokens in their order: the frozen shards, ``fuse.max_length``, ``fuse.packing``,
  and the version of the stage that packs them;
- the settings of ``[train]`` that change a result and are read by the loss of the gold tokens or by the optimizer: all but
  ``FUSION_SETTINGS``, the seed included.

Whatever only shapes the fused distributions (``[logits]``, ``[align]``, the rest of ``[fuse]``, and the sources as far as
the shards are cut alike) is not read. And figures are compared on the same documents, scored in the same way. A run is
compared with another one only if all of this agrees; without such an evaluated run there is no comparison.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pipeline.run.stage_table import FUSED, eval_key
from pipeline.run.steps import Request, ResolvedRun, Step

FUSION_SETTINGS: Final = ("lambda", "lambda_schedule", "lambda_end", "fusion_loss", "temperature", "tail_loss")
"""Settings of ``[train]`` that weight the fusion loss, and those that only the fusion loss reads."""


@dataclass(frozen=True)
class GoldOnly:
    """Evaluation of the same training on gold tokens only, or the reason why there is none.

    Attributes:
        figures: evaluation of the same training on gold tokens only, from ``read_result``; None if it is not evaluated.
        missing: reason why there are no figures, continuing a sentence that begins with the run; None if there are figures,
            or nothing to compare.
    """

    figures: dict[str, Any] | None
    missing: str | None


def is_gold_only(run: ResolvedRun) -> bool:
    """Return whether the fusion loss has no weight in any step: lambda is 1, and no schedule leaves it."""
    return not run.config.train.uses_fusion


def gold_training(run: ResolvedRun, text: str | None = None) -> dict[str, Any]:
    """Return what determines the result of a run's training if it learns only from gold tokens; see the module's text.

    Args:
        run: run whose training is described.
        text: name of the evaluated text; None: the held-out split.

    Two runs with equal values and no weight on the fusion loss have the same model and the same figures.
    """
    settings = run.config.train.result_settings()
    return {
        "train": {name: value for name, value in settings.items() if name not in FUSION_SETTINGS},
        "versions": [run.steps[stage].settings.get("version") for stage in ("fuse", "train")],
        "blocks": [run.config.fuse.max_length, run.config.fuse.packing],
        # Its fingerprint has the target's weights and tokenizer, the shards, which documents are scored, and how.
        "target before": run.steps[eval_key(run.config.target.name, text)].fingerprint,
    }


def find_gold_only(
    run: ResolvedRun,
    runs: Sequence[ResolvedRun],
    read: Callable[[Step], dict[str, Any] | None],
    run_url: str,
    text: str | None = None,
) -> GoldOnly:
    """Return the results of the same training on gold tokens only, or how to get them.

    Args:
        run: run that is compared.
        runs: the configurations of the run directory.
        read: reads a step's figures.
        run_url: the run directory.
        text: the figures on a text of the run; on the held-out split by default.
    """
    training = gold_training(run, text)
    twins = [
        other
        for other in runs
        if is_gold_only(other)
        and eval_key(other.config.target.name, text) in other.steps
        and gold_training(other, text) == training
    ]
    for twin in twins:
        figures = read(twin.steps[eval_key(FUSED, text)])
        if figures is not None:
            return GoldOnly(figures, None)
    command = _command(twins[-1].request if twins else _gold_only_request(run), run_url)
    return GoldOnly(None, f"needs the same training on gold tokens only, which is not evaluated here: `{command}`")


def _gold_only_request(run: ResolvedRun) -> Request:
    """Ask for the same but with lambda 1; a schedule cannot be taken back on the command line, so it ends at 1."""
    changes = {"name": f"{run.config.name}-gold-only", "train.lambda": "1"}
    if run.config.train.lambda_end is not None:
        changes["train.lambda_end"] = "1"
    kept = [override for override in run.request.overrides if override.partition("=")[0] not in changes]
    return Request(run.request.config_path, (*kept, *(f"{key}={value}" for key, value in changes.items())))


def _command(request: Request, run_url: str) -> str:
    sets = "".join(f" --set {shlex.quote(override)}" for override in request.overrides)
    return f"ptafuse eval {shlex.quote(str(request.config_path))} --run {shlex.quote(run_url)} --upstream{sets}"
