"""Model card of a finished model: its ingredients and settings; the evaluation adds its results later."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.measures.kinds import KindFigures
from stages.measures.standard_error import Estimate
from train.job import StepRecord, TrainJob

if TYPE_CHECKING:  # a report reads cards, and does without torch
    from train.model.rounding import RoundingSurvival

CARD = "README.md"
_EVALUATION = "## Evaluation"
_GOLD_ONLY = "The fused distributions were not read: lambda is 1, so it learned only from the gold tokens.\n"
_PENDING = "Not evaluated yet: `ptafuse eval` writes held-out bits per byte here."


def model_card(job: TrainJob, last: StepRecord, rounding: "RoundingSurvival | None" = None) -> str:
    """Write the Markdown of the card: models, data, settings, and the losses of the last step."""
    origin = f"{job.model.hub} (revision {job.model.revision})" if job.model.hub else "a local model"
    sources = "\n".join(f"- {name}" for name in job.sources) or "- none"
    losses = {"loss": last.loss, "loss_clm": last.loss_clm, "loss_fusion": last.loss_fusion}
    shown = "\n".join(f"| {name} | {value:.4f} |" for name, value in losses.items() if value is not None)
    note = "" if job.config.uses_fusion else _GOLD_ONLY
    return f"""---
library_name: transformers
tags: [knowledge-fusion, probabilistic-token-alignment]
---
# {job.model.name}, fused

Trained with ptafuse: knowledge fusion of language models by Probabilistic Token Alignment (PTA-LLM, arXiv 2509.17276).
{note}Weights are float32.{_rounded(rounding)} The license of the target model and the terms of the source models apply.

Target: {job.model.name}, {origin}.

Sources:
{sources}

Fingerprint of the training job: `{job.fingerprint}`. Optimizer steps: {last.step}. Tokens: {last.num_tokens}.

| last step | nats per token |
| --- | --- |
{shown}

{_EVALUATION}

{_PENDING}

## Settings

Training:

{_json(job.config.result_settings())}

Models, data, and the stages before training, each with its fingerprint:

{_json(dict(job.provenance))}
"""


@dataclass(frozen=True)
class PairedDifferences:
    """Paired differences in bits per byte between two models on one text.

    Attributes:
        over_bytes: over all bytes.
        by_kind: by kind of document; None where the documents have no kinds.
    """

    over_bytes: Estimate
    by_kind: KindFigures | None


@dataclass(frozen=True)
class TextRow:
    """Result of one model on a text.

    Attributes:
        label: display name of the model.
        bits_per_byte: over all bytes.
        by_kind: by kind of document; None where the documents have no kinds.
        against_before: difference to the target before training; None for the target itself and for sources.
        against_gold_only: difference to the same training on gold tokens only; None without such a run.
    """

    label: str
    bits_per_byte: float
    by_kind: KindFigures | None
    against_before: PairedDifferences | None
    against_gold_only: PairedDifferences | None


@dataclass(frozen=True)
class TextFigures:
    """Results of several models on a text other than the held-out split.

    Attributes:
        name: the text's.
        documents: number of scored documents, and why others are not scored, in words.
        rows: the models.
    """

    name: str
    documents: str
    rows: tuple[TextRow, ...]


def add_evaluation(
    model_folder: Path,
    figures: Sequence[tuple[str, float, int]],
    *,
    dtype: str,
    texts: Sequence[TextFigures] = (),
    endings: Sequence[tuple[str, int, int]] = (),
) -> None:
    """Write held-out results into the card of a finished model, replacing earlier ones.

    The card is the one file of the folder that its manifest does not hash.

    Args:
        model_folder: the exported model.
        figures: (what was evaluated, bits per byte, held-out bytes).
        dtype: the precision of the evaluation.
        texts: figures on other texts, a table each.
        endings: (what was asked, answers to held-out prompts that it ended by itself, all of its answers).

    Raises:
        ValueError: the folder's card has no place for them.
    """
    path = model_folder / CARD
    before, heading, after = path.read_text().partition(f"{_EVALUATION}\n")
    _, next_heading, rest = after.partition("\n## ")
    if not heading or not next_heading:
        raise ValueError(f"{path} is not ptafuse's model card: it has no section {_EVALUATION!r} before another one")
    rows = "\n".join(f"| {name} | {bits:.4f} | {num_bytes:,} |" for name, bits, num_bytes in figures)
    section = f"\n| model | bits per byte, in {dtype} | held-out bytes |\n| --- | --- | --- |\n{rows}\n"
    if endings:
        shown = "; ".join(f"{name}: {num_ended} of {num_answers}" for name, num_ended, num_answers in endings)
        section += f"\nGreedy answers to held-out prompts that end by themselves: {shown}.\n"
    section += "".join(f"\n{_text_table(text)}\n" for text in texts)
    temporary = path.with_name(f".{CARD}.{os.getpid()}")
    temporary.write_text(before + heading + section + next_heading + rest)
    temporary.replace(path)


def _text_table(text: TextFigures) -> str:
    """Write the Markdown table of a text: over all bytes, and the average over kinds if there are kinds.

    Empty columns are left out.
    """
    has_kinds = any(row.by_kind is not None for row in text.rows)
    columns = ["model", "bits per byte", "against target before", "against gold only"]
    if has_kinds:
        columns += [
            "average over kinds",
            "kinds against target before",
            "kinds won",
            "kinds against gold only",
            "kinds won",
        ]
    lines = []
    for row in text.rows:
        comparisons = (row.against_before, row.against_gold_only)
        cells = [row.label, f"{row.bits_per_byte:.4f}"]
        cells += ["" if differences is None else differences.over_bytes.signed() for differences in comparisons]
        if has_kinds:
            cells.append("" if row.by_kind is None else f"{row.by_kind.average.mean:.4f}")
            for differences in comparisons:
                kinds = None if differences is None else differences.by_kind
                cells += ["", ""] if kinds is None else [kinds.average.signed(), kinds.won]
        lines.append(cells)
    used = [index for index in range(len(columns)) if any(cells[index] for cells in lines)]
    shown = [columns, ["---"] * len(columns), *lines]
    table = "\n".join(f"| {' | '.join(cells[index] for index in used)} |" for cells in shown)
    return (
        f"Text {text.name}: {text.documents}. Bits per byte; differences are paired by document (± standard error over "
        f"documents), and an average over kinds weighs each kind of document the same.\n\n{table}"
    )


def _json(value: object) -> str:
    return f"```json\n{json.dumps(value, indent=2)}\n```"


def _rounded(rounding: "RoundingSurvival | None") -> str:
    """Say how much of the training is left where the model is loaded in bfloat16."""
    if rounding is None:
        return ""
    return (
        f" Of the weights that training changed, {rounding.share:.0%} still differ from their old values after "
        "rounding to bfloat16."
    )
