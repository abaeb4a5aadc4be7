"""Settings of the evaluation, and of the texts other than the held-out split that models are evaluated on."""

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from stages.contract.fingerprint import RUNTIME
from stages.contract.names import Name, refuse_same_folder
from stages.shard.config import DatasetConfig
from train.config import EvalConfig

HELD_OUT: Final = "heldout"
"""Name of the held-out split in settings that name it or a text."""

TEXT_VERSION: Final = 2
"""Version of the preparation of a text (choice, cut, overlap, segments); raised when its code gives other segments."""


class TextConfig(DatasetConfig):
    """An additional corpus on which models are evaluated: its location, and which part of it is read."""

    name: Annotated[Name, RUNTIME] = Field(description="Names its tables and result folders: letters, digits, . _ -")
    kind_column: str | None = Field(
        None,
        description="A string column with the kind of each document: documents are chosen from all kinds, and results "
        "are also averaged over kinds, all with the same weight.",
    )
    num_documents: int | None = Field(
        None,
        ge=1,
        description="Number of documents to choose: an equal share of each kind, as far as it has enough; by default "
        "all.",
    )
    fraction: float | None = Field(
        None, gt=0, le=1, description="Share of each kind to choose, instead of `num_documents`."
    )
    max_characters: int | None = Field(
        None,
        ge=1,
        description="A longer document is cut at the last whitespace before this length; by default documents are "
        "whole.",
    )
    overlap: Literal["filter", "refuse"] = Field(
        "filter",
        description="How to treat documents that share text with the training documents: `filter` excludes and counts "
        "them, `refuse` ends the evaluation.",
    )
    max_overlap: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Largest share of a document's 13-grams of words that may occur in the training documents.",
    )

    @property
    def section(self) -> str:
        """See ``DatasetConfig.section``."""
        return f"eval.texts.{self.name}"

    @model_validator(mode="after")
    def _is_sane(self) -> Self:
        if self.name.casefold() == HELD_OUT:
            raise ValueError(f"a text cannot be named {self.name!r}: that is the held-out split's name")
        if self.control_tokens != "split":
            raise ValueError(
                "control_tokens belongs in [dataset]: the run's tokenizers read all texts in the same way, so remove "
                "it here"
            )
        if self.has_conversations and self.max_characters is not None:
            raise ValueError(
                "max_characters cuts texts, and conversations are scored whole: remove it, or choose fewer "
                "conversations with num_documents"
            )
        if self.num_documents is not None and self.fraction is not None:
            raise ValueError("num_documents and fraction both set the number of documents: give only one of them")
        return self


class EvaluationConfig(EvalConfig):
    """Settings of the evaluation on held-out text and on other texts."""

    # Each text has results and fingerprints of its own: those of the held-out split do not depend on it.
    texts: Annotated[tuple[TextConfig, ...], RUNTIME] = Field(
        (), description="Corpora in addition to the held-out split, each with separate tables. See docs/evaluation.md."
    )

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        refuse_same_folder("names of texts", (text.name for text in self.texts))
        return self

    def find_text(self, name: str) -> TextConfig:
        """Return the text of that name.

        Raises:
            KeyError: there is none.
        """
        for text in self.texts:
            if text.name == name:
                return text
        raise KeyError(f"{name!r} is not one of this configuration's texts: {', '.join(t.name for t in self.texts)}")
