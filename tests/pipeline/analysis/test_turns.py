"""Tokens of a conversation and the messages that they belong to."""

import numpy as np
import pyarrow as pa

from pipeline.analysis.turns import message_of_tokens, segment_turns
from stages.contract.roles import Role

TEXT, START, EOS, TEMPLATE = Role.TEXT, Role.START, Role.EOS, Role.TEMPLATE
ENDS = [3, 4, 7]  # "ab", "", "cd", each with its virtual byte
TOKENS = [
    ("<bos>", 0, TEMPLATE),
    ("<user>", 0, START),
    ("a", 1, TEXT),
    ("b", 2, TEXT),
    ("<end>", 3, EOS),
    ("\n", 3, TEMPLATE),
    ("<assistant>", 3, START),
    ("<end>", 4, EOS),
    ("<user>", 4, START),
    ("cd", 6, TEXT),
    (" [/INST]", 6, TEMPLATE),  # a turn that no token of its own ends
    ("\n", 7, TEMPLATE),
]


def tables() -> tuple[pa.Table, pa.Table]:
    _, byte_end, roles = zip(*TOKENS, strict=True)
    shard = pa.table(
        {
            "doc_id": [1, 7],
            "segment": [0, 2],
            "message_role": [["user"], ["user", "assistant", "user"]],
            "message_end": pa.array([[1], ENDS], pa.list_(pa.int32())),
            "message_trained": [[False], [False, True, False]],
        }
    )
    logits = pa.table(
        {
            "doc_id": [7],
            "segment": [2],
            "byte_end": pa.array([list(byte_end)], pa.list_(pa.int32())),
            "role": pa.array([list(map(int, roles))], pa.list_(pa.uint8())),
        }
    )
    return shard, logits


def test_template_tokens_belong_to_the_message_that_they_lead_to() -> None:
    _, byte_end, roles = (np.array(column) for column in zip(*TOKENS, strict=True))
    found = message_of_tokens(np.array(ENDS), byte_end, roles)
    assert found.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]


def test_turns_have_all_tokens_once_and_say_what_is_learnt() -> None:
    found = segment_turns(*tables(), 0)
    assert found is not None
    assert [(turn.role, turn.is_trained, turn.start, turn.end) for turn in found.turns] == [
        ("user", False, 0, 5),
        ("assistant", True, 5, 8),
        ("user", False, 8, 12),
    ]
    assert [token for (token, _, _), bare in zip(TOKENS, found.is_template, strict=True) if not bare] == [
        "a",
        "b",
        "cd",
    ]


def test_plain_text_has_no_turns() -> None:
    shard, logits = tables()
    assert segment_turns(shard, logits.drop_columns(["role"]), 0) is None
    assert segment_turns(shard.drop_columns(["message_end", "message_role", "message_trained"]), logits, 0) is None
