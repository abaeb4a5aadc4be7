"""Alignment of conversations under six chat templates, end to end through the stage, on tables with made-up distributions."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

from stages.align.config import AlignConfig
from stages.align.stage import AlignStage
from stages.contract import schemas
from stages.contract.columns import list_column, list_row, sparse_columns, sparse_row
from stages.contract.roles import Role
from stages.models.config import ModelConfig
from stages.models.segment_text import Message, SegmentText
from stages.models.tokenizer import SegmentTokenizer
from tests.chat_tokenizers import CHATS, save_chat_tokenizer
from tests.stages.align.synthetic import _distributions

PAIRS = (
    ("chatml", "llama2"),
    ("llama2", "gemma"),
    ("gemma", "phi"),
    ("phi", "llama3"),
    ("llama3", "mistral"),
    ("mistral", "chatml"),
)
"""Each template once as target and once as source."""

TALKS = tuple(
    SegmentText.conversation(
        Message("user" if number % 2 == 0 else "assistant", content, is_trained=number % 2 == 1)
        for number, content in enumerate(contents)
    )
    for contents in (
        ("Who has seen the fox?", "The lazy dog. It does not mind; it has seen this fox before."),
        ("the <|im_end|> of the story </s>", "日本 \n  é😀", "", "In the morning the ships left.\n"),
        ("  def mean(values):\n    return sum", "\n\nThe dog", "Numbers: 1, 2, 3", "", "and", "He said: <end_of_turn>"),
    )
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, ModelConfig]:
    folder = tmp_path_factory.mktemp("chats")
    return {
        chat: ModelConfig(name=chat, path=save_chat_tokenizer(chat, folder / chat), reads_conversations=True)
        for chat in CHATS
    }


@pytest.fixture(scope="module")
def tables(models) -> dict[str, pa.Table]:
    """Provide a table of logits of each model, with candidates for every position, special ones too."""
    return {name: logits_table(SegmentTokenizer.load(model)) for name, model in models.items()}


def logits_table(tokenizer: SegmentTokenizer) -> pa.Table:
    rng = np.random.default_rng(3)
    encodings = tokenizer.encode_segments(TALKS)
    seen = np.concatenate([encoding.ids for encoding in encodings])
    nothing = np.zeros(tokenizer.vocabulary.size, bool)
    parts = [_distributions(encoding.ids, seen, 10, 0.8, rng, nothing) for encoding in encodings]
    size = tokenizer.vocabulary.size
    ids, logprobs = sparse_columns([rows for rows, _ in parts], schemas.id_type(size))
    schema = schemas.logits_schema(size, conversations=True)
    columns = {
        "doc_id": pa.array(range(len(TALKS)), pa.int64()),
        "segment": pa.array([0] * len(TALKS), pa.int32()),
        "token_ids": list_column([encoding.ids for encoding in encodings], schemas.id_type(size)),
        "byte_end": list_column([encoding.byte_end for encoding in encodings], pa.int32()),
        "gold_logprob": list_column([gold for _, gold in parts], pa.float32()),
        "topk_ids": ids,
        "topk_logprobs": logprobs,
        "role": list_column([encoding.role for encoding in encodings], pa.uint8()),
        "is_trained": list_column([encoding.is_trained for encoding in encodings], pa.bool_()),
    }
    return pa.table([columns[name] for name in schema.names], schema=schema)


def message_of(row: int, byte_end: int, role: int) -> int:
    """Which message a position with bytes, at a start or at the end of a turn is in."""
    ends = list(itertools.accumulate(len(message.content.encode()) + 1 for message in TALKS[row].messages))
    starts = [0, *ends[:-1]]
    if role == Role.START:
        return starts.index(byte_end)
    if role == Role.EOS:
        return ends.index(byte_end)
    return next(number for number, end in enumerate(ends) if byte_end < end)


@pytest.mark.parametrize("pairing", ["boundary", "edit-distance"])
@pytest.mark.parametrize(("target", "source"), PAIRS)
def test_positions_pair_within_their_message_and_only_learnt_ones_are_taught(models, tables, target, source, pairing):
    inexact = {"boundary": "condition", "edit-distance": "transport"}[pairing]
    stage = AlignStage(
        AlignConfig(preset="semi-relaxed", pairing=pairing, inexact=inexact), models[target], models[source]
    )
    stage.setup()
    output = stage.run({"target": tables[target], "source": tables[source]})
    assert output.quarantine == ()
    num_labels = num_covered = num_exact = 0
    for row in range(len(TALKS)):
        own, other = (
            [list_row(tables[name], column, row) for column in ("byte_end", "role", "is_trained")]
            for name in (target, source)
        )
        start, end, exact, outcome, taken = (
            list_row(output.table, name, row)
            for name in ("pair_start", "pair_end", "exact_context", "outcome", "source_position")
        )
        has_label = np.append(own[2][1:], False)
        fused = sparse_row(output.table, row)
        assert (outcome[~has_label] == 0).all()
        assert not fused.present[~has_label].any()
        assert (start[own[1] == Role.TEMPLATE] == -1).all()
        for position in np.flatnonzero(start >= 0):
            message = message_of(row, int(own[0][position]), int(own[1][position]))
            span = range(start[position], end[position])
            assert [message_of(row, int(other[0][there]), int(other[1][there])) for there in span] == [message] * len(
                span
            )
            if exact[position]:
                there = [k for k in span if other[0][k] == own[0][position] and other[1][k] == own[1][position]]
                assert there
                if taken[position] >= 0:
                    assert taken[position] == there[-1]
        num_labels += int(has_label.sum())
        num_covered += int((outcome > 0).sum())
        num_exact += int((exact & has_label).sum())
    health = output.health
    assert health["positions"] == num_labels
    assert health["covered"] == num_covered > num_labels // 3
    assert health["exact_contexts"] == num_exact
    kinds = ("one_to_one", "one_to_many", "many_to_one", "unpaired")
    assert sum(health[kind] for kind in kinds) == num_labels


@pytest.mark.parametrize(("target", "source"), [("chatml", "llama2"), ("gemma", "phi")])
def test_every_message_begins_at_a_shared_position_and_ends_at_one_where_both_templates_end_it(
    models, tables, target, source
):
    stage = AlignStage(AlignConfig(preset="semi-relaxed"), models[target], models[source])
    stage.setup()
    output = stage.run({"target": tables[target], "source": tables[source]})
    for row, talk in enumerate(TALKS):
        roles, exact = list_row(tables[target], "role", row), list_row(output.table, "exact_context", row)
        # Messages that begin with white space may share their first token with the template.
        expected = sum(not message.content[:1].isspace() for message in talk.messages)
        assert int((exact & (roles == Role.START)).sum()) >= expected
        num_answers = sum(message.role == "assistant" for message in talk.messages)
        assert int((exact & (roles == Role.EOS)).sum()) >= num_answers


def test_positions_of_conversations_can_be_explained(models, tables):
    stage = AlignStage(AlignConfig(preset="semi-relaxed"), models["chatml"], models["llama2"])
    stage.setup()
    inputs = {"target": tables["chatml"], "source": tables["llama2"]}
    output = stage.run(inputs)
    for row in range(len(TALKS)):
        outcomes = [schemas.PAIRED_BY[code] for code in list_row(output.table, "outcome", row)]
        explained = stage.explain_row(inputs, row)
        assert [explanation.outcome for explanation in explained] == outcomes
        # The end of a turn is shown by its role, in the context and among the candidates.
        ends = np.flatnonzero(list_row(tables["chatml"], "role", row) == Role.EOS)
        assert all(explained[position - 1].gold_next == "<eos>" for position in ends)
    assert stage.pair_mass(inputs, range(len(TALKS))).num_positions == output.health["covered"]
