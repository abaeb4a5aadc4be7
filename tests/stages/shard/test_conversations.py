"""The shard stage on conversations: read, cut between turns, quarantined with the reason, or counted."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from stages.contract.schemas import shard_schema
from stages.contract.stage import StageOutput
from stages.models.config import ModelConfig
from stages.models.segment_text import Message, SegmentText, segment_texts
from stages.models.tokenizer import SegmentTokenizer
from stages.shard.config import ShardConfig
from stages.shard.conversations import ConversationError, read_conversation
from stages.shard.stage import ShardStage
from tests.chat_tokenizers import save_chat_tokenizer

MAX_LENGTH = 200
TALK = [
    ("system", "Be brief."),
    *[(role, f"{role} says {number}") for number in range(12) for role in ("user", "assistant")],
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, ...]:
    folder: Path = tmp_path_factory.mktemp("chats")
    return tuple(
        ModelConfig(name=chat, path=save_chat_tokenizer(chat, folder / chat), reads_conversations=True)
        for chat in ("chatml", "gemma")
    )


def run(models: tuple[ModelConfig, ...], documents: list[Any], **settings: Any) -> StageOutput:
    train_on = settings.pop("train_on", "assistant")
    stage = ShardStage(
        ShardConfig(**{"max_length": MAX_LENGTH, "validation_fraction": 0.0, **settings}), models, train_on=train_on
    )
    stage.setup()
    raw = [document if isinstance(document, bytes | None) else json.dumps(document).encode() for document in documents]
    ids = pa.array(range(100, 100 + len(raw)), pa.int64())
    return stage.run({"documents": pa.table({"doc_id": ids, "text": pa.array(raw, pa.large_binary())})})


def openai(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def test_a_conversation_that_fits_is_one_row(models: tuple[ModelConfig, ...]) -> None:
    output = run(models, [openai(("user", "Who?\x03"), ("assistant", "A fox."))])
    assert output.table.schema.equals(shard_schema(conversations=True), check_metadata=True)
    output.table.validate(full=True)
    (row,) = output.table.to_pylist()
    assert row["text"] == "Who?\x03\x03A fox.\x03"
    assert row["message_role"] == ["user", "assistant"]
    assert row["message_end"] == [6, 13]
    assert row["message_trained"] == [False, True]
    assert row["is_last"]
    (segment,) = segment_texts(output.table)
    assert segment.messages == (Message("user", "Who?\x03", False), Message("assistant", "A fox.", True))
    assert output.health["bytes"] == 13
    for model in models:
        (encoding,) = SegmentTokenizer.load(model).encode_segments([segment])
        assert output.health[f"tokens/{model.name}"] == len(encoding.ids)


def test_a_long_conversation_is_cut_before_the_user_speaks(models: tuple[ModelConfig, ...]) -> None:
    output = run(models, [openai(*TALK)])
    rows = output.table.to_pylist()
    assert len(rows) > 2
    whole = "".join(f"{content}\x03" for _, content in TALK).encode()
    turns = []
    for index, row in enumerate(rows):
        assert row["segment"] == index
        assert row["is_last"] == (index == len(rows) - 1)
        assert row["message_role"][:2] == ["system", "user"]
        assert row["message_role"][-1] == "assistant"
        assert row["message_trained"] == [role == "assistant" for role in row["message_role"]]
        system = len(b"Be brief.\x03") if index > 0 else 0
        own = row["text"].encode()[system:]
        assert whole[row["byte_start"] :].startswith(own)
        turns += row["text"].split("\x03")[1:-1]
    assert turns == [content for _, content in TALK[1:]]
    assert output.health["bytes"] == len(whole)
    segments = segment_texts(output.table)
    for model in models:
        lengths = [len(encoding.ids) for encoding in SegmentTokenizer.load(model).encode_segments(segments)]
        assert max(lengths) <= MAX_LENGTH
        assert output.health[f"tokens/{model.name}"] == sum(lengths)
    for piece, following in pairwise(segments):  # another exchange would not have fitted
        longer = SegmentText.conversation([*piece.messages, *following.messages[1:3]])
        assert any(len(SegmentTokenizer.load(model).encode_segments([longer])[0].ids) > MAX_LENGTH for model in models)


def test_a_system_message_that_stands_again_is_not_learnt_again(models: tuple[ModelConfig, ...]) -> None:
    rows = run(models, [openai(*TALK)], train_on="all").table.to_pylist()
    assert [row["message_trained"][0] for row in rows] == [True] + [False] * (len(rows) - 1)
    assert all(all(row["message_trained"][1:]) for row in rows)


def test_pieces_of_which_nothing_is_learnt_are_left_out(models: tuple[ModelConfig, ...]) -> None:
    """The user's last word has no answer; it does not fit the piece before."""
    rows = run(models, [openai(*TALK[:5], ("user", "Why so? " * 20))], max_length=170).table.to_pylist()
    assert all(row["message_role"][-1] == "assistant" for row in rows)
    assert rows[-1]["is_last"]


def test_an_exchange_that_does_not_fit_is_quarantined(models: tuple[ModelConfig, ...]) -> None:
    output = run(models, [openai(*TALK[:3], ("user", "Tell me."), ("assistant", "Once upon a time. " * 40))])
    assert output.table.num_rows == 0
    (record,) = output.quarantine
    assert record.error == "CannotCut"
    assert record.message.startswith("messages 3 to 4 have ")
    assert " tokens with the system message under model " in record.message
    assert ", and an exchange is never cut: expected at most 200; raise shard.max_length" in record.message
    assert output.health["quarantined/CannotCut"] == 1


def test_a_last_question_of_any_length_costs_no_answer_before_it(models: tuple[ModelConfig, ...]) -> None:
    talk = openai(("user", "Who?"), ("assistant", "A fox."), ("user", "Read this. " * 100))
    output = run(models, [talk])
    assert not output.quarantine
    (row,) = output.table.to_pylist()
    assert row["text"] == "Who?\x03A fox.\x03"
    assert row["is_last"]
    assert output.health["bytes"] == len(row["text"])
    (record,) = run(models, [talk], train_on="all").quarantine
    assert record.message.startswith("message 2 has ")


def test_a_long_system_message_alone_is_named(models: tuple[ModelConfig, ...]) -> None:
    (record,) = run(models[:1], [openai(("system", "Be brief. " * 100))], train_on="all").quarantine
    assert record.error == "CannotCut"
    assert re.match(
        r"the system message has \d+ tokens under model chatml, and an exchange is never cut", record.message
    )


@pytest.mark.parametrize(
    ("document", "error", "message"),
    [
        (b"not JSON", "NotAConversation", "expected a list of messages, or JSON of one; found 'not JSON'"),
        ({"messages": []}, "NotAConversation", "expected a list of messages, found dict"),
        (["hello"], "NotAConversation", "message 0 is str, expected an object with role and content: 'hello'"),
        ([{"text": "a"}], "NotAConversation", "message 0 has no key 'role' (or ShareGPT's 'from'); found 'text'"),
        (
            openai(("narrator", "a")),
            "UnknownRole",
            "message 0 is of the role 'narrator'; expected one of 'system', 'user'",
        ),
        ([{"role": ["user"], "content": "a"}], "UnknownRole", "message 0 is of the role ['user']; expected one of"),
        ([{"role": {"name": "user"}, "content": "a"}], "UnknownRole", "message 0 is of the role {'name': 'user'};"),
        ([{"role": None, "content": "a"}], "UnknownRole", "message 0 is of the role None; expected one of"),
        ([{"role": "x" * 1000, "content": "a"}], "UnknownRole", f"of the role '{'x' * 39}...; expected one of"),
        (openai(("user", "a"), ("tool", "b")), "HasTools", "message 1 is of the role 'tool'"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}],
            "HasTools",
            "message 1 has tool_calls: conversations that use tools are not supported",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}, {"type": "text", "text": "a"}]}],
            "HasMedia",
            "message 0 (user) holds image_url: expected only text",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "OtherContent", "is list, expected a string"),
        (
            [{"role": "user", "content": None}],
            "OtherContent",
            "the content of message 0 (user) is null, expected a string",
        ),
        (
            [{"role": "assistant", "content": "a", "reasoning_content": "b"}],
            "OtherContent",
            "message 0 (assistant) has reasoning_content besides its content",
        ),
        (b'[{"role": "user", "content": "\\ud800"}]', "InvalidUtf8", "holds half of a surrogate pair at character 0"),
        (b"[\xff]", "InvalidUtf8", "not UTF-8 at byte 1 of 3"),
        (None, "NullText", "the messages column is null in this record"),
        (
            openai(("assistant", "a"), ("user", "b")),
            "CannotRender",
            "model gemma: the chat template refuses the conversation",
        ),
    ],
)
def test_what_is_no_conversation_is_quarantined_with_the_reason(
    models: tuple[ModelConfig, ...], document: Any, error: str, message: str
) -> None:
    output = run(models, [openai(("user", "Who?"), ("assistant", "A fox.")), document])
    assert output.table.num_rows == 1
    (record,) = output.quarantine
    assert (record.doc_id, record.segment, record.error) == (101, -1, error)
    assert message in record.message
    assert output.health[f"quarantined/{error}"] == 1


def test_conversations_without_anything_to_learn_are_counted(models: tuple[ModelConfig, ...]) -> None:
    output = run(models, [openai(("user", "Who?")), openai(("user", " \n"), ("assistant", "")), []])
    assert output.table.num_rows == 0
    assert output.quarantine == ()
    assert output.health["unlearnt_conversations"] == 1
    assert output.health["empty_documents"] == 2
    assert run(models, [openai(("user", "Who?"))], train_on="all").table.num_rows == 1


def test_the_split_does_not_depend_on_how_a_conversation_is_written(models: tuple[ModelConfig, ...]) -> None:
    talks = [openai(("user", f"Question {number}?"), ("assistant", "Yes.")) for number in range(40)]
    sharegpt = [
        [
            {"value": turn["content"], "from": {"user": "human", "assistant": "gpt"}[turn["role"]], "id": 3}
            for turn in talk
        ]
        for talk in talks
    ]
    one, other = (run(models, documents, validation_fraction=0.4).table for documents in (talks, sharegpt))
    assert one.equals(other)
    assert {"train", "validation"} == set(one["split"].to_pylist())


def test_control_tokens_in_messages_are_counted(models: tuple[ModelConfig, ...]) -> None:
    output = run(models, [openai(("user", "What is <|im_end|>?"), ("assistant", "A token."))])
    assert output.health["control_token/<|im_end|>"] == 1
    (segment,) = segment_texts(output.table)
    tokenizer = SegmentTokenizer.load(models[0])
    (encoding,) = tokenizer.encode_segments([segment])
    assert (encoding.ids == tokenizer.vocabulary.eos_id).sum() == 2


def test_a_table_with_wrong_ends_is_refused(models: tuple[ModelConfig, ...]) -> None:
    table = run(models, [openai(("user", "Who?"), ("assistant", "A fox."))]).table
    rows = table.to_pylist()
    rows[0]["message_end"] = [4, 12]
    with pytest.raises(ValueError, match="row 0 of the shard: no message ends at byte 4"):
        segment_texts(pa.Table.from_pylist(rows, schema=table.schema))
    rows[0]["message_end"] = [5]
    rows[0]["message_role"], rows[0]["message_trained"] = ["user"], [False]
    with pytest.raises(ValueError, match="its messages end at byte 5, and its text has 12 bytes"):
        segment_texts(pa.Table.from_pylist(rows, schema=table.schema))


def test_keys_without_a_value_do_not_hide_the_other_spelling() -> None:
    nulls = {"role": None, "content": None}
    mixed = [
        {**nulls, "from": "human", "value": "a"},
        {"role": "assistant", "content": "b", "from": None, "value": None},
    ]
    expected = read_conversation(json.dumps(openai(("user", "a"), ("assistant", "b"))).encode(), "assistant")
    assert read_conversation(json.dumps(mixed).encode(), "assistant") == expected


def test_an_empty_system_message_is_left_out() -> None:
    talk = openai(("system", " \n"), ("user", "Who?"), ("assistant", "A fox."))
    messages = read_conversation(json.dumps(talk).encode(), "all")
    assert messages == read_conversation(json.dumps(talk[1:]).encode(), "all")
    later = [*talk[1:], *talk]
    assert [message.role for message in read_conversation(json.dumps(later).encode(), "all")][2] == "system"


def test_reading_says_what_is_learnt() -> None:
    raw = json.dumps(
        [{"from": "system", "value": "s"}, {"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]
    ).encode()
    assert [message.is_trained for message in read_conversation(raw, "assistant")] == [False, False, True]
    assert [message.role for message in read_conversation(raw, "all")] == ["system", "user", "assistant"]
    assert all(message.is_trained for message in read_conversation(raw, "all"))
    with pytest.raises(ConversationError, match="expected a list of messages"):
        read_conversation(b"{}", "all")
