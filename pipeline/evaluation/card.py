"""Write the results of a run's models into the trained model's card."""

import logging
from collections.abc import Mapping
from typing import Any

from pipeline.evaluation.gold_only import find_gold_only, is_gold_only
from pipeline.evaluation.paired import differences_by_kind, figures_by_kind, paired_difference
from pipeline.evaluation.texts.describe import describe_counts
from pipeline.run.outcomes import count_endings, read_result
from pipeline.run.records import recorded_configurations
from pipeline.run.session import Run
from pipeline.run.stage_table import FUSED
from pipeline.run.steps import ResolvedRun
from pipeline.run.trained_model import publish_card, target_step, trained_model
from pipeline.settings.baselines import BASELINE_LABELS
from train.model.card import PairedDifferences, TextFigures, TextRow, add_evaluation

log = logging.getLogger(__name__)


def complete_card(run: Run) -> None:
    """Write the figures of all models, on the held-out split and on every text, into the trained model's card."""
    labels = {model.name: f"source {model.name}" for model in run.config.sources}
    labels |= {run.config.target.name: f"target {run.config.target.name} before", FUSED: "this model"}
    labels |= BASELINE_LABELS
    held_out = _results(run, None)
    figures = [(labels[model], value["bits_per_byte"], value["num_bytes"]) for model, value in held_out.items()]
    endings = [
        (labels[model], *counts) for model, value in held_out.items() if (counts := count_endings(value)) is not None
    ]
    peers = _recorded(run) if run.config.eval.texts else []
    texts = [_text_figures(run, text.name, labels, peers) for text in run.config.eval.texts]
    add_evaluation(
        trained_model(run, target_step(run)),
        figures,
        dtype=run.config.eval.dtype,
        texts=[text for text in texts if text is not None],
        endings=endings,
    )
    publish_card(run, target_step(run))


def _results(run: Run, text: str | None) -> dict[str, dict[str, Any]]:
    """Read the results of each model that has some, in the order of the steps."""
    results = {step.model: read_result(run.store, step) for step in run.resolved.of_stage("eval") if step.text == text}
    return {model: value for model, value in results.items() if model and value is not None and "refused" not in value}


def _text_figures(run: Run, text: str, labels: Mapping[str, str], peers: list[ResolvedRun]) -> TextFigures | None:
    results = _results(run, text)
    if not results:
        return None
    before = results.get(run.config.target.name)
    gold_only = None
    if not is_gold_only(run.resolved):
        gold_only = find_gold_only(
            run.resolved, peers, lambda step: read_result(run.store, step), run.store.url, text
        ).figures
    compared = {FUSED, *run.config.baselines.methods}
    rows = [
        TextRow(
            labels[model],
            value["bits_per_byte"],
            figures_by_kind(value),
            _comparison(value, before) if model in compared else None,
            _comparison(value, gold_only) if model == FUSED else None,
        )
        for model, value in results.items()
    ]
    return TextFigures(text, describe_counts(next(iter(results.values()))["counts"]), tuple(rows))


def _comparison(value: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> PairedDifferences | None:
    if baseline is None:
        return None
    return PairedDifferences(paired_difference(value, baseline), differences_by_kind(value, baseline))


def _recorded(run: Run) -> list[ResolvedRun]:
    """Read the recorded configurations that name a text, since one of them may train on only the gold tokens."""
    try:
        recorded = list(recorded_configurations(run.store).values())
    except ValueError as error:  # of another version: the card is not worth ending the command for
        log.warning("the model card has no comparison with training on gold tokens only: %s", error)
        return []
    return [other for other in recorded if other.config.eval.texts]
