"""Settings of the evaluation, and of the texts other than the held-out split that models are evaluated on."""

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from stages.contract.fingerprint import RUNTIME
from stages.contract.names import Name, refuse_same_folder
from stages.shard.config import DatasetConfig
from train.config import EvalConfig

HELD_OUT: Final = "heldout"
"""Name of the held-out split in settings that name it or a text."""

TEXT_VERSION: Final = 1
"""Version of the preparation of a text (choice, cut, overlap, segments); raised when its code gives other segments."""


class TextConfig(DatasetConfig):
    """An additional corpus on which models are evaluated: its location, and which part of it is read."""

    name: Annotated[Name, RUNTIME] = Field(description="Names its tables and result folders: letters, digits, . _ -")
    kind_column: str | None = Field(
        None,
        description="A column of strings that says of what kind a document is: documents are spread over the kinds, and "
        "figures are also averaged over kinds, all with the same weight.",
    )
    num_documents: int | None = Field(
        None,
        ge=1,
        description="Documents that are chosen, as many of each kind as there are, up to an equal share; all by default.",
    )
    fraction: float | None = Field(None, gt=0, le=1, description="Instead of `num_documents`: this share of each kind.")
    max_characters: int | None = Field(
        None, ge=1, description="A longer document is cut at the last white space before; whole documents by default."
    )
    overlap: Literal["filter", "refuse"] = Field(
        "filter",
        description="What becomes of documents that share text with the training documents: `filter` leaves them out and "
        "counts them, `refuse` ends the evaluation.",
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
                "control_tokens stands in [dataset]: the run's tokenizers read all texts alike, so leave it out here"
            )
        if self.has_conversations and self.max_characters is not None:
            raise ValueError(
                "max_characters cuts texts, and conversations are scored whole: leave it out, or choose fewer of them with "
                "num_documents"
            )
        if self.num_documents is not None and self.fraction is not None:
            raise ValueError("num_documents and fraction both say how many documents are chosen: give one of them")
        return self


class EvaluationConfig(EvalConfig):
    """Settings of the evaluation on held-out text and on other texts."""

    # Each text has results and fingerprints of its own: those of the held-out split do not depend on it.
    texts: Annotated[tuple[TextConfig, ...], RUNTIME] = Field(
        (), description="Corpora besides the held-out split, each with tables of its own. See docs/evaluation.md."
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
