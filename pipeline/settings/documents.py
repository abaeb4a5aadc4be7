"""Settings that decide which text is scored; results are paired document by document only if they agree."""

from collections.abc import Mapping
from typing import Any, Final

from pipeline.settings.run import RunConfig

PLACE: Final = ("dataset.hub", "dataset.revision", "dataset.subset", "dataset.split", "dataset.path")
"""Settings that say where the documents come from."""
DECIDES: Final = (
    *PLACE,
    "dataset.documents",
    "dataset.control_tokens",  # they decide where a text is cut, as max_length does
    "dataset.text_column",
    "dataset.messages_column",
    "dataset.train_on",
    "dataset.max_documents",
    "shard.max_length",  # of a segment without BOS nothing predicts the first token, so the cuts decide what is scored
    "shard.validation_fraction",
    "shard.test_fraction",
    "eval.split",
    "eval.max_documents",
)
"""Settings that decide which documents are scored, and which parts. All others decide how, or where it is computed."""


def scored_documents(config: RunConfig) -> dict[str, Any]:
    """Return the settings that decide what text is scored: dotted key -> value."""
    keys = [key.split(".") for key in DECIDES]
    return {f"{section}.{name}": getattr(getattr(config, section), name) for section, name in keys}


def scored_texts(config: RunConfig) -> tuple[str, ...]:
    """Return what decides which documents of other texts are scored: each text's name, place and settings, in words."""
    return tuple(
        " ".join(f"{key} {value}" for key, value in text.model_dump().items() if value is not None)
        for text in config.eval.texts
    )


def other_documents(documents: Mapping[str, Any], baseline: Mapping[str, Any]) -> str | None:
    """Return what two configurations differ in that decides what text is scored, in words; None where they agree.

    Args:
        documents: settings of the first run, from ``scored_documents``; both runs may have further keys.
        baseline: settings of the run that it is compared with.
    """
    differ = [(key, value, baseline[key]) for key, value in documents.items() if value != baseline[key]]
    return "; ".join(f"{key} is {_shown(value)}, there {_shown(other)}" for key, value, other in differ) or None


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
