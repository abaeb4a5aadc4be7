"""Draws from the tails in the fuse stage: rows have them, and nothing is judged by them."""

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from stages.contract.columns import PAD_ID, ids_column, list_column, list_row, sparse_row
from stages.contract.draws import add_draws, draws_row, without_draws
from stages.contract.schemas import aligned_schema, logits_schema
from stages.fuse.blocks import locate
from stages.fuse.weights import candidate_weights
from stages.measures.teacher import completed_nll
from stages.models.tokenizer import SegmentTokenizer
from tests.stages.fuse.test_stage import Inputs, entries, find_row, make_inputs

NUM_DRAWS = 3
NAMES = ("target", "one", "two")


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("fuse"), tail="bucket")


@pytest.fixture(scope="module")
def sampled(exact: Inputs) -> Inputs:
    """The same tables with draws in the logits; the aligned rows are of the exact entries, and say what they are worth."""
    rng = np.random.default_rng(0)
    tables = {}
    for model in (exact.target, *exact.sources):
        table = exact.tables[f"logits/{model.name}"]
        size = SegmentTokenizer.load(model).vocabulary.size
        tables[f"logits/{model.name}"] = pa.table(
            [
                *table.columns,
                ids_column([random_draws(table, row, size, rng) for row in range(table.num_rows)], pa.uint16()),
            ],
            schema=logits_schema(size, has_draws=True),
        )
    target = exact.tables["logits/target"]
    size = SegmentTokenizer.load(exact.target).vocabulary.size
    for source in exact.sources:
        table = exact.tables[f"align/{source.name}"]
        judged = [completed(table, row, target) for row in range(table.num_rows)]
        schema = aligned_schema(size, "bucket", has_draws=True)
        tables[f"align/{source.name}"] = pa.table([*table.columns, list_column(judged, pa.float32())], schema=schema)
    return replace(exact, tables=tables)


def random_draws(table: pa.Table, row: int, size: int, rng: np.random.Generator) -> np.ndarray:
    window = sparse_row(table, row).ids
    return np.array(
        [sorted(rng.choice(np.setdiff1d(np.arange(size), ids), NUM_DRAWS).tolist()) for ids in window], np.int32
    )


def completed(table: pa.Table, row: int, target: pa.Table) -> np.ndarray:
    place = find_row(target, table["doc_id"][row].as_py(), table["segment"][row].as_py())
    rows, own = sparse_row(table, row), sparse_row(target, place)
    return -completed_nll(
        rows.ids,
        np.exp(rows.logprobs.astype(np.float64)),
        list_row(table, "tail_mass", row).astype(np.float64),
        np.append(list_row(target, "token_ids", place)[1:].astype(np.int64), PAD_ID),
        own_ids=own.ids,
        own_probs=np.exp(own.logprobs.astype(np.float64)),
        own_gold_logprob=list_row(target, "gold_logprob", place),
    )


def positions_of(inputs: Inputs, table: pa.Table):
    """(block, position, row of the target's table, position there) of every position that has a next token."""
    target = inputs.tables["logits/target"]
    for block in range(table.num_rows):
        for position in range(len(table["token_ids"][block])):
            place = locate(table, block, position)
            row = find_row(target, place.doc_id, place.segment)
            if place.position < len(target["token_ids"][row]) - 1:
                yield block, position, row, place.position


def gold_logprobs(inputs: Inputs, row: int, position: int) -> list[float]:
    """What each candidate gives the gold token, by its exact entries; NaN where it has no distribution."""
    target = inputs.tables["logits/target"]
    found = [float(list_row(target, "gold_logprob", row)[position])]
    for source in inputs.sources:
        table = inputs.tables[f"align/{source.name}"]
        try:
            place = find_row(table, target["doc_id"][row].as_py(), target["segment"][row].as_py())
        except KeyError:
            found.append(math.nan)
            continue
        found.append(float(list_row(table, "completed_logprob", place)[position]))
    return found


def test_weights_are_fitted_to_the_same_numbers_as_without_draws(exact, sampled):
    found, expected = sampled.stage().gold_nll(sampled.tables), exact.stage().gold_nll(exact.tables)
    assert len(found.nll) > 20
    np.testing.assert_array_equal(found.nll, expected.nll)
    np.testing.assert_array_equal(found.doc_ids, expected.doc_ids)


@pytest.mark.parametrize("top_k", [4, 12])
def test_rows_are_the_weighted_sum_of_rows_with_draws(sampled, top_k):
    stage = sampled.stage(function="avg-ce", granularity="token", top_k=top_k)
    output = stage.run(sampled.tables)
    table, target = output.table, sampled.tables["logits/target"]
    widest, num_checked = 0, 0
    for block, position, row, place in positions_of(sampled, table):
        window = sparse_row(target, row)
        ids, probs = add_draws(window.ids, np.exp(window.logprobs.astype(np.float64)), draws_row(target, row))
        candidates = [{int(i): p for i, p in zip(ids[place], probs[place], strict=True) if i != PAD_ID}]
        for source in sampled.sources:
            aligned = sampled.tables[f"align/{source.name}"]
            try:
                key = target["doc_id"][row].as_py(), target["segment"][row].as_py()
                candidates.append(entries(sparse_row(aligned, find_row(aligned, *key)), place))
            except KeyError:
                candidates.append({})
        scores = [
            math.exp(logprob) if rows else 0.0
            for rows, logprob in zip(candidates, gold_logprobs(sampled, row, place), strict=True)
        ]
        expected: dict[int, float] = {}
        for rows, score in zip(candidates, scores, strict=True):
            for token, prob in rows.items():
                expected[token] = expected.get(token, 0.0) + score / sum(scores) * prob
        found = entries(sparse_row(table, block), position)
        kept = sorted(expected.values(), reverse=True)[: top_k + NUM_DRAWS * len(NAMES)]
        assert sorted(found.values(), reverse=True) == pytest.approx(kept, rel=5e-3)
        assert all(expected[token] == pytest.approx(prob, rel=5e-3) for token, prob in found.items())
        assert list_row(table, "tail_mass", block)[position] == pytest.approx(1 - sum(found.values()), abs=3e-3)
        widest, num_checked = max(widest, len(found)), num_checked + 1
    assert num_checked == output.health["fused"]
    assert widest > top_k
    if top_k == 12:
        assert output.health["cut_mass"].total == pytest.approx(0, abs=1e-9), "all draws are kept"


def test_tokens_choose_by_what_exact_entries_give_them(sampled):
    table = sampled.stage(granularity="token").run(sampled.tables).table
    winners = set()
    for block, position, row, place in positions_of(sampled, table):
        judged = np.array([gold_logprobs(sampled, row, place)])
        weights = candidate_weights(-judged, ~np.isnan(judged), function="min-ce")
        assert list_row(table, "chosen", block)[position] == weights[0].argmax()
        winners.add(int(weights[0].argmax()))
    assert len(winners) > 1


@pytest.mark.parametrize("function", ["min-ce", "avg-ce"])
def test_teacher_nll_is_of_the_weighted_sum_of_completed_probabilities(sampled, function):
    stage = sampled.stage(function=function)
    health = stage.run(sampled.tables).health
    target = sampled.tables["logits/target"]
    nll = []
    for row, fused in enumerate(stage.fused_segments(sampled.tables, range(target.num_rows))):
        for position in np.flatnonzero(fused.present):
            logprobs = gold_logprobs(sampled, row, int(position))
            weights = fused.weights[position].tolist()
            nll.append(
                -math.log(sum(w * math.exp(logprob) for w, logprob in zip(weights, logprobs, strict=True) if w > 0))
            )
    assert health["completed_nll"].count == len(nll) == health["fused"] > 20
    assert health["completed_nll"].value == pytest.approx(np.mean(nll), rel=1e-6)
    assert health["floored_nll"].count == health["target_floored_nll"].count == 0
    assert health["target_exact_nll"].count == len(nll)


def test_a_candidate_that_only_draws_gave_a_row_is_taken_last(sampled):
    """Its exact entries give no distribution, so nobody knows what it is worth."""
    table = sampled.tables["align/one"]
    unknown = [np.full(len(list_row(table, "completed_logprob", row)), np.nan) for row in range(table.num_rows)]
    column = table.schema.get_field_index("completed_logprob")
    changed = table.set_column(column, table.schema.field(column), list_column(unknown, pa.float32()))
    inputs = replace(sampled, tables={**sampled.tables, "align/one": changed})
    known, unknown = (part.stage(granularity="token").run(part.tables).health for part in (sampled, inputs))
    assert known["chosen/one"] > 0
    assert unknown["chosen/one"] == 0
    assert unknown["fused"] == known["fused"]
    assert len(inputs.stage().gold_nll(inputs.tables).nll) == 0


@pytest.mark.parametrize("name", ["logits/target", "align/two"])
def test_tables_with_and_without_draws_are_not_mixed(sampled, exact, name):
    tables = {**sampled.tables, name: exact.tables[name]}
    with pytest.raises(ValueError, match=rf"have draws from the tail, {name} have none: .* run `make align`"):
        sampled.stage().run(tables)
    assert without_draws(sampled.tables["logits/target"]).equals(exact.tables["logits/target"])
