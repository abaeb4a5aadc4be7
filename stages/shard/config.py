"""Settings of the shard stage."""

from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from stages.contract.filesystem import refuse_secrets
from stages.contract.fingerprint import ADDED, RUNTIME, Settings
from stages.models.config import check_place

VERSION: Final = 3
"""Version of the stage's algorithm; raised when its code gives other rows for the same settings.

3: a conversation keeps the messages before a last question that does not fit."""

CONTROL_TOKEN_DOCUMENTS: Final = "control_token_documents"
"""Health metric: documents that hold the text of a control token."""
UNLEARNT_CONVERSATIONS: Final = "unlearnt_conversations"
"""Health metric: conversations without anything to train on, which have no row."""
QUARANTINED: Final = "quarantined/"
"""Begins the health metrics that count quarantined conversations by the class of the reason (``conversations``)."""
CONTROL_TOKEN: Final = "control_token/"
"""Begins the health metrics of single control tokens."""


def absolute_or_url(path: str | None) -> str | None:
    """Make a path absolute, since a worker may run in another folder; URLs are returned unchanged.

    Raises:
        ValueError: a URL holds a password, signature or token, which would be recorded.
    """
    if path is None or "://" in path:
        return path if path is None else refuse_secrets(path)
    return str(Path(path).expanduser().absolute())


class DatasetConfig(Settings):
    """Source of the documents."""

    hub: str | None = Field(None, description="Hugging Face dataset id, e.g. 'JeanKaddour/minipile'.")
    revision: str | None = Field(None, description="Commit of the dataset on the hub; required with `hub`.")
    subset: str | None = Field(None, description="The hub dataset's configuration name, if it has several.")
    split: str | None = Field(
        None,
        description="The split to read. On the hub, by default `train`; with `path`, the files with this split in "
        "their names (train-*.parquet, test/*.jsonl), by default all files.",
    )
    path: Annotated[str | None, AfterValidator(absolute_or_url), RUNTIME] = Field(
        None, description="A file (.parquet, .jsonl, .jsonl.zst, .txt), a folder of them, a glob, or an fsspec URL."
    )
    documents: Annotated[Literal["file", "lines"], ADDED] = Field(
        "file", description="For .txt files: each file is a document, or each line that is not blank (`lines`)."
    )
    control_tokens: Annotated[Literal["split", "parse"], ADDED] = Field(
        "split",
        description="How to treat the text of control tokens (`<|im_start|>`) in documents: as ordinary text, or each "
        "model reads its own control tokens as tokens (`parse`), for conversations that were rendered with its "
        "template.",
    )
    text_column: str = Field("text", description="The column that holds a document's text; .txt files have none.")
    messages_column: Annotated[str | None, ADDED] = Field(
        None,
        description="The column that holds a conversation, instead of `text_column`: a list of `role` and `content` (or "
        "of ShareGPT's `from` and `value`), or a JSON string of such a list. See docs/conversations.md.",
    )
    train_on: Annotated[Literal["assistant", "all"], ADDED] = Field(
        "assistant",
        description="Messages of conversations to train on: the assistant's and their ends, or every message.",
    )
    kind_column: Annotated[str | None, RUNTIME] = Field(
        None,
        description="A string column with the kind of each document (its source, subject, language): `ptafuse "
        "interpret` shows by kind which model wins. It can be set after a run: no stage reads it, except with "
        "fuse.per = 'kind'.",
    )
    max_documents: int | None = Field(
        None, ge=1, description="Number of documents to read, from the first; by default all."
    )

    @property
    def has_conversations(self) -> bool:
        """Whether documents are conversations, not texts."""
        return self.messages_column is not None

    @property
    def document_column(self) -> str:
        """Column that holds a document."""
        return self.text_column if self.messages_column is None else self.messages_column

    @property
    def document_setting(self) -> str:
        """Setting that names that column, for messages."""
        return "text_column" if self.messages_column is None else "messages_column"

    @property
    def section(self) -> str:
        """Section of the configuration that holds these settings, for messages."""
        return "dataset"

    def result_settings(self) -> dict[str, Any]:
        """Return the settings that change results. A split that is not given is "train", as it was by default."""
        settings = super().result_settings()
        return {**settings, "split": settings["split"] or "train"}

    @model_validator(mode="before")
    @classmethod
    def _fill_split(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("hub") is not None and values.get("split") is None:
            return {**values, "split": "train"}
        return values

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        check_place(hub=self.hub, revision=self.revision, path=self.path)
        return self

    @model_validator(mode="after")
    def _text_or_conversations(self) -> Self:
        if self.messages_column is None:
            if self.train_on != "assistant":
                raise ValueError(
                    f"train_on = {self.train_on!r} says what is learned from conversations, but messages_column is not "
                    "set: set messages_column, or remove train_on"
                )
            return self
        if self.text_column != type(self).model_fields["text_column"].default:
            raise ValueError(
                f"text_column = {self.text_column!r} and messages_column = {self.messages_column!r} both name the "
                "column of the documents: remove text_column for conversations, or messages_column for texts"
            )
        if self.control_tokens == "parse":
            raise ValueError(
                'control_tokens = "parse" reads conversations that were rendered to text, and messages_column = '
                f"{self.messages_column!r} names a column of messages, which every model renders with its own "
                "template: remove one of them"
            )
        return self


class ShardConfig(Settings):
    """Settings for cutting documents into shards of segments."""

    max_length: int = Field(
        2048, ge=8, description="Maximum number of tokens of a segment under every tokenizer, including special ones."
    )
    documents_per_shard: int = Field(
        4000, ge=1, description="Documents per shard; a shard should take less than 10 minutes."
    )
    validation_fraction: float = Field(
        0.01, ge=0, lt=1, description="Share of documents that are held out, by a hash of their text."
    )
    test_fraction: Annotated[float, ADDED] = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of documents in a second held-out split: settings are chosen on one split and reported on "
        "the other.",
    )
    max_bad_fraction: Annotated[float, RUNTIME] = Field(
        0.01, ge=0, le=1, description="A shard with more bad documents than this fails."
    )
    num_workers: Annotated[int | None, RUNTIME] = Field(
        None, ge=1, description="Number of actors; by default one per CPU."
    )
    cpus_per_worker: Annotated[float, RUNTIME] = Field(1, gt=0, description="CPUs that Ray reserves per actor.")

    @model_validator(mode="after")
    def _something_is_left_to_train_on(self) -> Self:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"validation_fraction + test_fraction = {self.validation_fraction} + {self.test_fraction} leaves no "
                "document to train on: their sum must be below 1"
            )
        return self

    def fraction_of(self, split: Literal["train", "validation", "test"]) -> float:
        """Return the share of the documents that a split is expected to have."""
        held_out = {"validation": self.validation_fraction, "test": self.test_fraction}
        return held_out[split] if split in held_out else 1 - sum(held_out.values())
