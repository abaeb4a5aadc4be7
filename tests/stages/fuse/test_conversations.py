"""Conversations in the fuse stage: tables of ``test_stage`` with roles and learnt tokens, against a computation by hand."""

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from stages.contract.columns import find_row, list_column, list_row, sparse_row
from stages.contract.roles import Role
from stages.contract.schemas import fused_schema
from stages.fuse.blocks import locate
from stages.models.tokenizer import SegmentTokenizer
from tests.stages.fuse.test_stage import SEGMENTS, Inputs, make_inputs

NUM_TEMPLATE = 2
"""Tokens at the start of every segment that count as template."""


def as_conversations(table: pa.Table) -> pa.Table:
    """Give a logits table the columns of conversations.

    The first tokens are the template's; then a message that is not learnt, and one that is; the last token ends its turn and
    owns one byte.
    """
    roles, trained = [], []
    for row in range(table.num_rows):
        size = len(table["token_ids"][row])
        role = np.full(size, Role.TEXT, np.uint8)
        role[:NUM_TEMPLATE] = (Role.TEMPLATE, Role.START)
        role[-1] = Role.EOS
        roles.append(role)
        trained.append(np.arange(size) >= size // 2)
    table = table.append_column(pa.field("role", pa.list_(pa.uint8()), nullable=False), list_column(roles, pa.uint8()))
    return table.append_column(
        pa.field("is_trained", pa.list_(pa.bool_()), nullable=False), list_column(trained, pa.bool_())
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    made = make_inputs(tmp_path_factory.mktemp("fuse-conversations"), tail="bucket", missing=False)
    tables = {
        name: as_conversations(table) if name.startswith("logits/") else table for name, table in made.tables.items()
    }
    return replace(made, tables=tables)


def learnt(table: pa.Table, row: int) -> np.ndarray:
    """(N,) bool: the position's next token is learnt."""
    return np.append(list_row(table, "is_trained", row)[1:], False)


def test_only_learnt_positions_have_a_fused_distribution(inputs):
    target = inputs.tables["logits/target"]
    output = inputs.stage(packing="whole", max_length=64).run(inputs.tables)
    size = SegmentTokenizer.load(inputs.target).vocabulary.size
    expected = fused_schema(size, "bucket", ("target", "one", "two"), conversations=True)
    assert output.table.schema.equals(expected, check_metadata=True)
    num_fused = 0
    for block in range(output.table.num_rows):
        fused, chosen = sparse_row(output.table, block), list_row(output.table, "chosen", block)
        for position in range(len(chosen)):
            place = locate(output.table, block, position)
            row = find_row(target, place.doc_id, place.segment)
            is_trained = list_row(target, "is_trained", row)
            assert list_row(output.table, "is_trained", block)[position] == is_trained[place.position]
            assert fused.present[position] == learnt(target, row)[place.position] == (chosen[position] >= 0)
            num_fused += int(fused.present[position])
    assert output.health["positions"] == output.health["fused"] == num_fused
    assert num_fused == sum(int(learnt(target, row).sum()) for row in range(target.num_rows))
    assert output.health["target_exact_nll"].count == num_fused


@pytest.mark.parametrize("unit", ["bits-per-byte", "nats-per-token"])
def test_the_choice_is_by_the_cross_entropy_of_the_learnt_tokens(inputs, unit):
    """The end of a turn counts with its loss and without its byte."""
    output = inputs.stage(packing="whole", max_length=64, granularity="segment", unit=unit).run(inputs.tables)
    target = inputs.tables["logits/target"]
    for row, key in enumerate(SEGMENTS):
        expected = []
        for model in (inputs.target, *inputs.sources):
            table = inputs.tables[f"logits/{model.name}"]
            here = find_row(table, *key[:2])
            is_trained = list_row(table, "is_trained", here)
            ends = list_row(table, "byte_end", here)
            nats = num_bytes = 0.0
            for token in range(1, len(ends)):
                if is_trained[token]:
                    nats -= float(list_row(table, "gold_logprob", here)[token - 1])
                    num_bytes += ends[token] - ends[token - 1] - (token == len(ends) - 1)
            expected.append(
                nats / math.log(2) / num_bytes if unit == "bits-per-byte" else nats / float(is_trained[1:].sum())
            )
        explained = inputs.stage(packing="whole", max_length=64, granularity="segment", unit=unit).explain(
            inputs.tables, row, int(np.flatnonzero(learnt(target, row))[0])
        )
        assert [part.cross_entropy for part in explained.candidates] == pytest.approx(expected)
    assert output.health["fused"] > 0


def test_weights_are_fitted_on_learnt_positions(inputs):
    target = inputs.tables["logits/target"]
    nll, doc_ids = inputs.stage(packing="whole", max_length=64).gold_nll(inputs.tables)
    expected, documents = [], []
    for row in range(target.num_rows):
        # The positions at which both sources have a row, and know the gold token.
        present = learnt(target, row)
        for source in inputs.sources:
            table = inputs.tables[f"align/{source.name}"]
            present &= sparse_row(table, find_row(table, *SEGMENTS[row][:2])).present
        expected += (-list_row(target, "gold_logprob", row)[present]).tolist()
        documents += [SEGMENTS[row][0]] * int(present.sum())
    assert len(nll) > 10
    assert nll[:, 0] == pytest.approx(np.array(expected), rel=1e-6)
    assert doc_ids.tolist() == documents


def test_a_position_that_is_not_learnt_is_explained_with_the_token_that_follows(inputs):
    stage = inputs.stage(packing="whole", max_length=64)
    target = inputs.tables["logits/target"]
    vocabulary = SegmentTokenizer.load(inputs.target).vocabulary
    token_ids = list_row(target, "token_ids", 0)
    for position, found in enumerate(stage.explain_row(inputs.tables, 0)):
        is_last = position + 1 == len(token_ids)
        assert found.gold == (None if is_last else vocabulary.text(int(token_ids[position + 1])))
        assert found.is_learnt == learnt(target, 0)[position] == (found.chosen is not None)


def test_conversations_are_not_cut(inputs):
    with pytest.raises(
        ValueError, match=r"these are conversations, which must stay whole: set fuse\.packing = 'whole'"
    ):
        inputs.stage(packing="cut").run(inputs.tables)
