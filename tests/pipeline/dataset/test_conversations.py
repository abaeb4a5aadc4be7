"""Conversations in every format: a list of messages, ShareGPT's, or JSON strings; other columns are refused."""

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset.documents import check_dataset, plan_documents, read_documents, read_kinds
from pipeline.dataset.files import DatasetError
from stages.shard.config import DatasetConfig
from stages.shard.conversations import read_conversation

TALKS = [
    [
        {"role": "system", "content": "Be brief. é日😀"},
        {"role": "user", "content": f"Question {index}?\n"},
        {"role": "assistant", "content": "x" * index},
    ]
    for index in range(7)
]
SHAREGPT = [
    [
        {"from": {"user": "human", "assistant": "gpt"}.get(turn["role"], turn["role"]), "value": turn["content"]}
        for turn in talk
    ]
    for talk in TALKS
]
EXPECTED = [[(turn["role"], turn["content"]) for turn in talk] for talk in TALKS]
DATED = [[{**turn, "at": dt.datetime(2024, 1, 1, tzinfo=dt.UTC), "image": None} for turn in talk] for talk in TALKS]


def parquet(folder: Path, column: pa.Array, name: str = "messages") -> DatasetConfig:
    table = pa.table({name: column, "source": pa.array([f"kind {row % 2}" for row in range(len(column))])})
    pq.write_table(table, folder / "talks.parquet", row_group_size=3)
    return DatasetConfig(path=str(folder / "talks.parquet"), messages_column=name, kind_column="source")


def jsonl(folder: Path, values: list[Any], name: str = "messages") -> DatasetConfig:
    lines = [json.dumps({"id": 1, name: value, "source": f"kind {row % 2}"}) for row, value in enumerate(values)]
    (folder / "talks.jsonl").write_text("\n".join(lines))
    return DatasetConfig(path=str(folder / "talks.jsonl"), messages_column=name, kind_column="source")


def read(dataset: DatasetConfig, per_shard: int = 3) -> list[Any]:
    """Return every document of a dataset: its messages, None for a null, or what is wrong with the record."""
    check_dataset(dataset)
    found: list[Any] = []
    for part in plan_documents(dataset, per_shard):
        for row in read_documents(dataset, part).to_pylist():
            if row["error"] is not None:
                found.append(row["error"])
            elif row["text"] is None:
                found.append(None)
            else:
                found.append([(message.role, message.content) for message in read_conversation(row["text"], "all")])
    return found


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda folder: parquet(folder, pa.array(TALKS)), id="parquet"),
        pytest.param(
            lambda folder: parquet(folder, pa.array(TALKS, pa.large_list(pa.array(TALKS).type.value_type))),
            id="large lists",
        ),
        pytest.param(lambda folder: parquet(folder, pa.array(SHAREGPT), "conversations"), id="parquet of ShareGPT"),
        pytest.param(
            lambda folder: parquet(folder, pa.array([json.dumps(talk) for talk in TALKS])), id="strings in parquet"
        ),
        pytest.param(
            lambda folder: parquet(folder, pa.array([json.dumps(talk) for talk in SHAREGPT]).dictionary_encode()),
            id="dictionary of strings",
        ),
        pytest.param(lambda folder: parquet(folder, pa.array(DATED)), id="other fields"),
        pytest.param(lambda folder: jsonl(folder, TALKS), id="jsonl"),
        pytest.param(lambda folder: jsonl(folder, SHAREGPT, "conversations"), id="jsonl of ShareGPT"),
        pytest.param(lambda folder: jsonl(folder, [json.dumps(talk) for talk in TALKS]), id="strings in jsonl"),
    ],
)
@pytest.mark.parametrize("per_shard", [3, 100])
def test_every_format_gives_the_same_conversations(tmp_path: Path, make: Any, per_shard: int) -> None:
    dataset = make(tmp_path)
    assert read(dataset, per_shard) == EXPECTED
    kinds = [kind for part in plan_documents(dataset, per_shard) for kind in read_kinds(dataset, part).values()]
    assert kinds == [f"kind {row % 2}" for row in range(len(TALKS))]


def test_nulls_and_records_without_messages_keep_their_number(tmp_path: Path) -> None:
    dataset = jsonl(tmp_path, [TALKS[0], None, {"a": 1}, 3, TALKS[1]])
    expected = "the value of 'messages' is {}, expected a list of messages"
    assert read(dataset) == [EXPECTED[0], None, expected.format("dict"), expected.format("int"), EXPECTED[1]]
    assert read(parquet(tmp_path, pa.array([TALKS[0], None, TALKS[1]]))) == [EXPECTED[0], None, EXPECTED[1]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: parquet(folder, pa.array([1, 2])),
            (
                "column 'messages' is int64, not conversations: set dataset.messages_column to a column of a list of messages "
                "with role and content (or ShareGPT's from and value), or JSON strings of such lists"
            ),
        ),
        (
            lambda folder: parquet(folder, pa.array([[{"question": "a", "answer": "b"}]])),
            "column 'messages' is list<element: struct<question: string, answer: string>>, not conversations",
        ),
        (
            lambda folder: parquet(folder, pa.array(["a text"])),
            "column 'messages' holds a text: set dataset.messages_column to",
        ),
        (
            lambda folder: jsonl(folder, ["a text"]),
            "column 'messages' holds a text: set dataset.messages_column to a column",
        ),
        (
            lambda folder: jsonl(folder, [{"question": "a"}]),
            "column 'messages' holds {'question': 'a'}: set dataset.messages_column to a column of a list of messages",
        ),
        (
            lambda folder: jsonl(folder, [TALKS[0]], "chat").model_copy(update={"messages_column": "messages"}),
            "has no column 'messages': set dataset.messages_column to one of 'id', 'chat', 'source'",
        ),
        (
            lambda folder: jsonl(folder, [TALKS[0]]).model_copy(update={"messages_column": None}),
            (
                "has no column 'text': set dataset.text_column to one of 'id', 'messages', 'source' (conversations: set "
                "dataset.messages_column = 'messages')"
            ),
        ),
        (
            lambda folder: parquet(folder, pa.array(TALKS)).model_copy(
                update={"messages_column": None, "text_column": "messages"}
            ),
            (
                "not text: set dataset.text_column to a column of strings; conversations are read with "
                "dataset.messages_column = 'messages'"
            ),
        ),
    ],
)
def test_a_column_of_something_else_is_refused_with_what_was_found(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(DatasetError) as error:
        check_dataset(make(tmp_path))
    assert message in str(error.value)


def test_plain_text_has_no_messages(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hello")
    with pytest.raises(DatasetError, match=r"dataset\.messages_column = 'messages': plain text files have no columns"):
        check_dataset(DatasetConfig(path=str(tmp_path / "a.txt"), messages_column="messages"))
