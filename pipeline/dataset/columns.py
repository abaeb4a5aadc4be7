"""Columns of a dataset's files: of texts, of messages, or of the kinds of documents."""

import json
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from stages.shard.config import DatasetConfig

_TEXT_TYPES: Final = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
)
_LABEL_TYPES: Final = (pa.types.is_integer, pa.types.is_boolean)
"""Types whose values may name kinds, besides those of text."""
_LIST_TYPES: Final = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)
_MESSAGE_KEYS: Final = ({"role", "content"}, {"from", "value"})
_LIKELY: Final = ("messages", "conversations", "conversation")
"""Names under which data sets hold conversations."""
_MAX_SHOWN: Final = 60
"""Characters of a value that a message shows."""
EXPECTED: Final = (
    "a list of messages with role and content (or ShareGPT's from and value), or JSON strings of such lists"
)


@dataclass(frozen=True)
class Column:
    """A column of a dataset's files.

    Attributes:
        name: the column's name.
        setting: the setting that names it, for messages.
        holds_messages: its values are conversations, which are read as JSON; else they are texts.
        holds_labels: its values are names of kinds, or their numbers; a record may have none.
    """

    name: str
    setting: str
    holds_messages: bool = False
    holds_labels: bool = False


def document_column(dataset: DatasetConfig) -> Column:
    """Return the column that holds a dataset's documents."""
    return Column(dataset.document_column, dataset.document_setting, dataset.has_conversations)


def kind_column(dataset: DatasetConfig) -> Column | None:
    """Return the column that holds the kinds of a dataset's documents; None where it names none."""
    return None if dataset.kind_column is None else Column(dataset.kind_column, "kind_column", holds_labels=True)


def describe_missing(column: Column, names: list[str], section: str) -> str:
    """Return the error message about a missing column: the existing columns, and how to name one.

    Args:
        column: the column that is wanted.
        names: names of the existing columns.
        section: the section of the configuration.
    """
    likely = [name for name in names if name in _LIKELY and column.setting == "text_column"]
    hint = f" (conversations: set {section}.messages_column = {likely[0]!r})" if likely else ""
    return (
        f"has no column {column.name!r}: set {section}.{column.setting} to one of {', '.join(map(repr, names))}{hint}"
    )


def wrong_type(column: Column, kind: pa.DataType, section: str) -> str | None:
    """Return what a message says of a column of a type that cannot be read; None where it can be."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if any(test(kind) for test in _TEXT_TYPES):
        return None
    if column.holds_labels and any(test(kind) for test in _LABEL_TYPES):
        return None
    setting = f"{section}.{column.setting}"
    fields = _fields(kind)
    if column.holds_labels:
        return f"column {column.name!r} is {kind}: set {setting} to a column of strings or integers"
    if not column.holds_messages:
        is_messages = any(keys <= fields for keys in _MESSAGE_KEYS)
        remedy = f"; conversations are read with {section}.messages_column = {column.name!r}" if is_messages else ""
        return f"column {column.name!r} is {kind}, not text: set {setting} to a column of strings{remedy}"
    if any(keys <= fields for keys in _MESSAGE_KEYS):
        return None
    return f"column {column.name!r} is {kind}, not conversations: set {setting} to a column of {EXPECTED}"


def wrong_value(column: Column, value: Any, section: str) -> str | None:
    """Return the error message about the first value of a column if it is no conversation, or no label, else None.

    Args:
        column: the column.
        value: a value as JSON gives it; None where there is none.
        section: the section of the configuration.
    """
    shown = str(value) if len(str(value)) <= _MAX_SHOWN else f"{str(value)[:_MAX_SHOWN]}..."
    if column.holds_labels and label_text(value) is None and value is not None:
        return (
            f"column {column.name!r} holds {shown}: set {section}.{column.setting} to a column of strings or integers"
        )
    if not column.holds_messages or value is None:
        return None
    messages = value
    if isinstance(value, str | bytes):
        try:
            messages = json.loads(value)
        except (ValueError, RecursionError):
            messages = None
    is_list = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
    if is_list and all(not {"role", "from"}.isdisjoint(message) for message in messages):
        return None
    return f"column {column.name!r} holds {shown}: set {section}.{column.setting} to a column of {EXPECTED}"


def label_text(value: Any) -> str | None:
    """Return the name of a kind as JSON gives it, a number as its digits; None where it is neither text nor integer."""
    if isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, int) else None


def as_binary(values: pa.Array) -> pa.Array:
    """Return any column of text as bytes, unchecked; of lists of messages their JSON, of numbers their digits."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if any(test(values.type) for test in _LIST_TYPES):
        return pa.array([None if value is None else as_json(value) for value in values.to_pylist()], pa.large_binary())
    if any(test(values.type) for test in _LABEL_TYPES):
        values = values.cast(pa.large_string())
    return values.cast(pa.large_binary())


def as_json(value: Any) -> bytes:
    """Return a list of messages as JSON; values that JSON does not support (dates, bytes) are replaced by their type."""
    return json.dumps(value, default=lambda other: f"<{type(other).__name__}>").encode()


def _fields(kind: pa.DataType) -> set[str]:
    """Return the names of the fields of a list of structs; none of another type."""
    if not any(test(kind) for test in _LIST_TYPES) or not pa.types.is_struct(kind.value_type):
        return set()
    return {kind.value_type.field(index).name for index in range(kind.value_type.num_fields)}
