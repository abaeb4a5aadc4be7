"""Warnings about the documents, given before anything expensive runs.

Texts may leave nothing to evaluate or to train on, and conversations may have been rendered as text.
"""

import math
from collections.abc import Mapping
from typing import Final

from pipeline.dataset.files import DatasetError
from pipeline.dataset.find import find_files
from pipeline.dataset.formats import TEXT
from pipeline.settings.run import RunConfig
from stages.contract.manifest import HealthMetric
from stages.shard.config import CONTROL_TOKEN, CONTROL_TOKEN_DOCUMENTS, DatasetConfig

MIN_EXPECTED_DOCUMENTS: Final = 3.0
"""Held-out documents that are expected; with fewer there is none with a probability of 5 % and more."""
SUGGESTED_DOCUMENTS: Final = 10
"""Held-out documents that a larger share is suggested for."""
MIN_CONTROL_TOKEN_SHARE: Final = 0.01
"""Share of documents with control tokens from which status warns: single pages speak of such tokens in any corpus."""
_FEW_DOCUMENTS: Final = 100
_NAMED_TOKENS: Final = 5


def expected_warnings(config: RunConfig, num_documents: int | None) -> list[str]:
    """Say what the number of documents lets expect, before they are split.

    Args:
        config: config of the run.
        num_documents: number of documents of the dataset; None: unknown.
    """
    if not num_documents:
        return []
    split = config.eval.split
    fraction = config.shard.fraction_of(split)
    expected = fraction * num_documents
    if num_documents == 1:
        return [
            "the dataset is one document, and one document cannot be both trained on and evaluated on"
            + (_lines_hint(config.dataset, num_documents) or ": split it into documents")
        ]
    if fraction == 0:
        warning = (
            f"shard.{split}_fraction = 0 holds no document out, so the evaluation after training will have nothing to score: "
            f"set it to {_suggested(num_documents):g}, say"
        )
        return [warning]
    if expected >= MIN_EXPECTED_DOCUMENTS:
        return []
    return [
        f"shard.{split}_fraction = {fraction:g} of {num_documents:,} documents holds out about {expected:.1f} to "
        f"evaluate on, and none with a probability of {math.pow(1 - fraction, num_documents):.0%}: set it to "
        f"{_suggested(num_documents):g}, say" + _lines_hint(config.dataset, num_documents)
    ]


def shard_warnings(config: RunConfig, health: Mapping[str, HealthMetric]) -> list[str]:
    """Say what the health metrics of the finished shard stage show.

    Args:
        config: config of the run.
        health: added up over all shards.
    """
    warnings = []
    documents, split = health.get("documents"), config.eval.split
    if isinstance(documents, int) and documents:
        if health.get(f"{split}_segments") == 0:
            fraction = config.shard.fraction_of(split)
            warnings.append(
                f"shard: none of {documents:,} documents is held out (shard.{split}_fraction = {fraction:g}): the evaluation "
                f"after training will have nothing to score. Set it to {_suggested(documents):g}, say, and run shard again"
                + _lines_hint(config.dataset, documents)
            )
        if health.get("train_segments") == 0:
            warnings.append(
                f"shard: all {documents:,} documents are held out, and nothing is left to train on: give more documents, or "
                f"lower shard.{split}_fraction" + _lines_hint(config.dataset, documents)
            )
    control = health.get(CONTROL_TOKEN_DOCUMENTS)
    # Messages of a conversation may speak of control tokens: they are text there, and the templates' own are tokens.
    is_text = not config.dataset.has_conversations
    if (
        is_text
        and isinstance(documents, int)
        and isinstance(control, int)
        and control >= MIN_CONTROL_TOKEN_SHARE * documents
    ):
        warnings.append(
            f"shard: {control:,} of {documents:,} documents hold control tokens of the run's models as text "
            f"({_most_frequent(health)}), which is split like any other text: were conversations rendered with a chat "
            "template? Give the conversations themselves, with dataset.messages_column, and every model renders them "
            "with its "
            'own template (docs/conversations.md); or set dataset.control_tokens = "parse" to read them as tokens'
        )
    return warnings


def _suggested(num_documents: int) -> float:
    """Return a share of documents that leaves some, but not most, to evaluate on; two digits."""
    share = min(0.5, SUGGESTED_DOCUMENTS / num_documents)
    digits = 1 - math.floor(math.log10(share))
    return math.ceil(share * 10**digits) / 10**digits


def _lines_hint(dataset: DatasetConfig, num_documents: int) -> str:
    """Return how .txt files give more documents; nothing where there are enough, or no such files."""
    if num_documents > _FEW_DOCUMENTS or dataset.path is None:
        return ""
    try:
        is_text = find_files(dataset).format == TEXT
    except (FileNotFoundError, DatasetError):  # it has moved since it was sharded
        return ""
    if not is_text:
        return ""
    return (
        f'. A .txt file is one document: set {dataset.section}.documents = "lines" if each of its lines is one, or write each '
        "document to a separate file"
    )


def _most_frequent(health: Mapping[str, HealthMetric]) -> str:
    counts = {
        name.removeprefix(CONTROL_TOKEN): count
        for name, count in health.items()
        if name.startswith(CONTROL_TOKEN) and isinstance(count, int)
    }
    return ", ".join(sorted(counts, key=lambda token: (-counts[token], token))[:_NAMED_TOKENS])
