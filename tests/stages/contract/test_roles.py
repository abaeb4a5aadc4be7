"""What each token of a segment is, read from columns or derived."""

import numpy as np
import pyarrow as pa

from stages.contract.columns import list_column
from stages.contract.roles import Role, has_roles, roles_of
from stages.contract.schemas import has_conversations, logits_schema, shard_schema


def test_a_plain_corpus_has_its_roles_by_place_and_learns_what_anything_precedes() -> None:
    table = pa.table({"token_ids": list_column([np.array([1, 5, 6, 2]), np.array([7, 8])], pa.uint16())})
    assert not has_roles(table)
    whole = roles_of(table, 0, prefix_id=1, eos_id=2)
    assert whole.role.tolist() == [Role.BOS, Role.TEXT, Role.TEXT, Role.EOS]
    assert whole.is_trained.tolist() == [False, True, True, True]
    assert roles_of(table, 1, prefix_id=None, eos_id=2).role.tolist() == [Role.TEXT, Role.TEXT]


def test_a_conversation_has_its_roles_in_columns() -> None:
    role = np.array([Role.TEMPLATE, Role.START, Role.TEXT, Role.EOS], np.uint8)
    trained = np.array([False, False, True, True])
    table = pa.table(
        {
            "token_ids": list_column([np.array([1, 5, 6, 2])], pa.uint16()),
            "role": list_column([role], pa.uint8()),
            "is_trained": list_column([trained], pa.bool_()),
        }
    )
    assert has_roles(table)
    found = roles_of(table, 0, prefix_id=1, eos_id=2)
    assert found.role.tolist() == role.tolist()
    assert found.is_trained.tolist() == trained.tolist()


def test_start_is_the_bos_of_a_message() -> None:
    assert Role.START is Role.BOS
    assert [role.value for role in Role] == [0, 1, 2, 3]


def test_plain_corpora_have_the_schemas_that_they_had() -> None:
    assert not has_conversations(shard_schema())
    assert has_conversations(shard_schema(conversations=True))
    assert "role" not in logits_schema(100).names
    assert logits_schema(100, has_draws=True, conversations=True).names[-3:] == ["sample_ids", "role", "is_trained"]
