"""The fuse stage on small hand-made tables, against a position-by-position computation."""

import math
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pyarrow as pa
import pytest

from stages.contract.columns import PAD_ID, SparseRows, find_row, list_column, list_row, sparse_columns, sparse_row
from stages.contract.schemas import PAIRED_BY, aligned_schema, fused_schema, id_type, logits_schema
from stages.fuse.blocks import locate
from stages.fuse.config import FuseConfig
from stages.fuse.stage import FuseStage
from stages.measures.cross_entropy import CrossEntropy, cross_entropy
from stages.measures.teacher import TEACHER_FLOOR
from stages.models.config import ModelConfig
from stages.models.tokenizer import SegmentTokenizer
from tests.tiny_tokenizers import TEXTS, save_tokenizer

SEGMENTS = [(3, 0, False), (3, 1, True), (5, 0, True), (8, 0, True)]
"""(doc_id, segment, is_last)."""


@dataclass
class Inputs:
    target: ModelConfig
    sources: tuple[ModelConfig, ...]
    tables: dict[str, pa.Table]

    def stage(self, **settings) -> FuseStage:
        chosen = {"max_length": 16, "packing": "cut", "min_context": 0, **settings}
        stage = FuseStage(FuseConfig(**chosen), self.target, self.sources)
        stage.setup()
        return stage


def random_rows(rng, num_rows: int, vocab_size: int, *, empty: float, mass: float) -> SparseRows:
    ids, logprobs = np.full((num_rows, 4), PAD_ID, np.int32), np.full((num_rows, 4), -np.inf, np.float32)
    for row in range(num_rows):
        width = 0 if rng.random() < empty else int(rng.integers(1, 5))
        probs = np.sort(rng.dirichlet(np.ones(width)))[::-1] * mass if width else np.empty(0)
        ids[row, :width] = rng.choice(vocab_size, width, replace=False)
        logprobs[row, :width] = np.log(probs)
    return SparseRows(ids, logprobs)


def logits_table(rng, tokenizer: SegmentTokenizer, texts, segments) -> pa.Table:
    size = tokenizer.vocabulary.size
    schema = logits_schema(size)
    encodings = [tokenizer.encode(texts[key[:2]], is_last=key[2]) for key in segments]
    gold = [np.append(-rng.random(len(e.ids) - 1) * 5, np.nan) for e in encodings]
    ids, logprobs = sparse_columns(
        [random_rows(rng, len(e.ids), size, empty=0, mass=0.9) for e in encodings], id_type(size)
    )
    columns = [
        pa.array([key[0] for key in segments], pa.int64()),
        pa.array([key[1] for key in segments], pa.int32()),
        list_column([e.ids for e in encodings], id_type(size)),
        list_column([e.byte_end for e in encodings], pa.int32()),
        list_column(gold, pa.float32()),
        ids,
        logprobs,
    ]
    return pa.table(columns, schema=schema)


def aligned_table(rng, target: pa.Table, size: int, segments, *, tail: str) -> pa.Table:
    schema = aligned_schema(size, tail)
    lengths = [len(target["token_ids"][find_row(target, *key[:2])]) for key in segments]
    parts = [random_rows(rng, length, size, empty=0.3, mass=0.8 if tail == "bucket" else 1.0) for length in lengths]
    ids, logprobs = sparse_columns(parts, id_type(size))
    zeros = [np.zeros(length, np.int32) for length in lengths]
    columns = [
        pa.array([key[0] for key in segments], pa.int64()),
        pa.array([key[1] for key in segments], pa.int32()),
        *[list_column(zeros, pa.int32()) for _ in range(3)],
        list_column([z.astype(bool) for z in zeros], pa.bool_()),
        list_column(zeros, pa.uint8()),
        ids,
        logprobs,
    ]
    if tail == "bucket":
        columns.append(list_column([np.where(part.present, 0.2, 0.0) for part in parts], pa.float32()))
    return pa.table(columns, schema=schema)


def make_inputs(folder, *, tail: str, missing: bool = True) -> Inputs:
    rng = np.random.default_rng(7)
    models = [
        ModelConfig(name=name, path=save_tokenizer(family, folder / name))
        for name, family in (("target", "spm-bpe"), ("one", "byte-bpe"), ("two", "unigram"))
    ]
    tokenizers = [SegmentTokenizer.load(model) for model in models]
    texts = {key[:2]: TEXTS[index][: 25 + 9 * index] for index, key in enumerate(SEGMENTS)}
    fewer = [key for key in SEGMENTS if not missing or key[:2] != (3, 1)]
    target = logits_table(rng, tokenizers[0], texts, SEGMENTS)
    size = tokenizers[0].vocabulary.size
    tables = {"logits/target": target}
    for model, tokenizer, segments in zip(models[1:], tokenizers[1:], (SEGMENTS, fewer), strict=True):
        tables[f"logits/{model.name}"] = logits_table(rng, tokenizer, texts, segments)
        tables[f"align/{model.name}"] = aligned_table(rng, target, size, segments[::-1], tail=tail)
    return Inputs(models[0], tuple(models[1:]), tables)


@pytest.fixture(scope="module", params=["renormalise", "bucket"])
def inputs(request, tmp_path_factory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("fuse"), tail=request.param)


def entries(rows: SparseRows, position: int) -> dict[int, float]:
    return {
        int(i): math.exp(p) for i, p in zip(rows.ids[position], rows.logprobs[position], strict=True) if i != PAD_ID
    }


def expected_candidates(inputs: Inputs, row: int, position: int, tail: str) -> list[dict[int, float]]:
    """Return the candidates' rows; an empty one has no distribution."""
    target = inputs.tables["logits/target"]
    own = entries(sparse_row(target, row), position)
    if tail == "renormalise":
        own = {token: prob / sum(own.values()) for token, prob in own.items()}
    found = [own]
    key = (target["doc_id"][row].as_py(), target["segment"][row].as_py())
    for source in inputs.sources:
        table = inputs.tables[f"align/{source.name}"]
        try:
            found.append(entries(sparse_row(table, find_row(table, *key)), position))
        except KeyError:
            found.append({})
    return found


def segment_entropies(inputs: Inputs, key: tuple[int, int]) -> list[CrossEntropy]:
    found = []
    for model in (inputs.target, *inputs.sources):
        table = inputs.tables[f"logits/{model.name}"]
        is_special = SegmentTokenizer.load(model).vocabulary.is_special
        try:
            row = find_row(table, *key)
        except KeyError:
            found.append(CrossEntropy(0, 0, 0))
            continue
        ids = list_row(table, "token_ids", row)
        found.append(
            cross_entropy(list_row(table, "gold_logprob", row), list_row(table, "byte_end", row), is_special[ids])
        )
    return found


def expected_entropies(inputs: Inputs, granularity: str, unit: str, max_length: int) -> dict:
    """(row, position) -> the candidates' cross-entropies, for the granularities that do not look at tokens."""
    target = inputs.tables["logits/target"]
    keys = [key[:2] for key in SEGMENTS]
    of = {key: segment_entropies(inputs, key) for key in keys}

    def value(part: CrossEntropy) -> float:
        return part.bits_per_byte if unit == "bits-per-byte" else part.nats_per_token

    flat = [(row, t) for row in range(len(keys)) for t in range(len(target["token_ids"][row]))]
    found = {}
    for start in range(0, len(flat), max_length):
        pieces = sorted({row for row, _ in flat[start : start + max_length]})
        for row, position in flat[start : start + max_length]:
            if granularity == "block":
                values = [[value(of[keys[piece]][c]) for piece in pieces] for c in range(3)]
                values = [[v for v in column if not math.isnan(v)] for column in values]
                found[row, position] = [sum(v) / len(v) if v else math.nan for v in values]
                continue
            same = [key for key in keys if key[0] == keys[row][0]] if granularity == "document" else [keys[row]]
            found[row, position] = [value(sum((of[key][c] for key in same), CrossEntropy(0, 0, 0))) for c in range(3)]
    return found


def fuse_by_hand(candidates, ces, function) -> tuple[dict[int, float], int]:
    present = [c for c in range(len(candidates)) if candidates[c]]
    if not present:
        return {}, -1
    known = [math.inf if math.isnan(ces[c]) else ces[c] for c in present]
    if function == "min-ce":
        weights = {present[known.index(min(known))]: 1.0}
    else:
        scores = [math.exp(-ce) for ce in known]
        weights = {c: score / sum(scores) for c, score in zip(present, scores, strict=True)}
    union: dict[int, float] = {}
    for c, weight in weights.items():
        for token, prob in candidates[c].items():
            union[token] = union.get(token, 0.0) + weight * prob
    return union, max(weights, key=lambda c: (weights[c], -c))


@pytest.mark.parametrize(
    ("granularity", "function", "unit"),
    [
        *product(("document", "segment", "block"), ("min-ce", "avg-ce"), ("bits-per-byte", "nats-per-token")),
        *product(("token",), ("min-ce", "avg-ce"), ("bits-per-byte",)),
    ],
)
def test_every_strategy_agrees_with_the_computation_by_hand(inputs, granularity, function, unit):
    stage = inputs.stage(granularity=granularity, function=function, unit=unit, top_k=12)
    tail = "bucket" if "tail_mass" in inputs.tables["align/one"].schema.names else "renormalise"
    table = stage.run(inputs.tables).table
    by_span = {} if granularity == "token" else expected_entropies(inputs, granularity, unit, 16)
    target = inputs.tables["logits/target"]
    for block in range(table.num_rows):
        fused, chosen = sparse_row(table, block), list_row(table, "chosen", block)
        for position in range(len(chosen)):
            place = locate(table, block, position)
            row = find_row(target, place.doc_id, place.segment)
            tokens = list_row(target, "token_ids", row)
            assert list_row(table, "token_ids", block)[position] == tokens[place.position]
            if place.position == len(tokens) - 1:
                assert not fused.present[position]
                continue
            candidates = expected_candidates(inputs, row, place.position, tail)
            gold = int(tokens[place.position + 1])
            ces = by_span.get((row, place.position)) or [
                -math.log(max(candidate.get(gold, 0.0), TEACHER_FLOOR)) for candidate in candidates
            ]
            expected, winner = fuse_by_hand(candidates, ces, function)
            assert chosen[position] == winner
            assert entries(fused, position) == pytest.approx(expected, rel=5e-3)
            if tail == "bucket" and expected:
                tail_mass = list_row(table, "tail_mass", block)[position]
                assert tail_mass == pytest.approx(1 - sum(expected.values()), abs=2e-3)


def test_table_has_the_schema_and_every_token_once_in_order(inputs):
    output = inputs.stage().run(inputs.tables)
    target = inputs.tables["logits/target"]
    size = SegmentTokenizer.load(inputs.target).vocabulary.size
    tail = "bucket" if "tail_mass" in inputs.tables["align/one"].schema.names else "renormalise"
    expected = fused_schema(size, tail, ("target", "one", "two"))
    assert output.table.schema.equals(expected, check_metadata=True)
    output.table.validate(full=True)
    tokens = [token for row in output.table["token_ids"].to_pylist() for token in row]
    assert tokens == [token for row in target["token_ids"].to_pylist() for token in row]
    assert output.num_tokens == len(tokens)
    for row in output.table.to_pylist():
        assert row["piece_start"][0] == 0
        assert len(row["chosen"]) == len(row["token_ids"]) == len(row["topk_ids"]) == len(row["topk_logprobs"])
        assert len(row["piece_start"]) == len(row["piece_doc_id"]) == len(row["piece_offset"])


def test_run_is_deterministic(inputs):
    stage = inputs.stage(function="avg-ce")
    assert stage.run(inputs.tables).table.equals(stage.run(inputs.tables).table)


def test_health_counts_add_up(inputs):
    output = inputs.stage(top_k=2, function="avg-ce").run(inputs.tables)
    health = output.health
    chosen = np.concatenate([list_row(output.table, "chosen", row) for row in range(output.table.num_rows)])
    assert health["segments"] == len(SEGMENTS)
    assert health["blocks"] == output.table.num_rows
    assert output.num_tokens == len(chosen)
    assert health["positions"] == output.num_tokens - len(SEGMENTS), "the last position of a segment has no next token"
    assert health["fused"] == (chosen >= 0).sum() == len(chosen) - len(SEGMENTS)
    assert [health[f"chosen/{name}"] for name in ("target", "one", "two")] == np.bincount(chosen[chosen >= 0]).tolist()
    assert health["missing_source_segments"] == 1
    assert 0 < health["cut_mass"].value < 1


def judged_by_hand(inputs: Inputs, table: pa.Table, *, top_k: int) -> dict[str, list[float]]:
    """The figures of every position with a fused distribution; infinite where a row has no tail to give the gold token."""
    target = inputs.tables["logits/target"]
    found = {name: [] for name in ("completed_nll", "target_exact_nll", "floored_nll", "target_floored_nll")}
    for block in range(table.num_rows):
        fused = sparse_row(table, block)
        for position in np.flatnonzero(fused.present):
            place = locate(table, block, int(position))
            row = find_row(target, place.doc_id, place.segment)
            gold = int(list_row(target, "token_ids", row)[place.position + 1])
            gold_logprob = float(list_row(target, "gold_logprob", row)[place.position])
            stored, window = entries(fused, position), entries(sparse_row(target, row), place.position)
            left = 1 - sum(prob for token, prob in window.items() if token in stored)
            tail = list_row(table, "tail_mass", block)[position] if "tail_mass" in table.schema.names else 0.0
            rest = tail * math.exp(gold_logprob) / max(left, math.exp(gold_logprob))
            prob = stored.get(gold, rest)
            found["completed_nll"].append(-math.log(prob) if prob else math.inf)
            found["target_exact_nll"].append(-gold_logprob)
            own = dict(list(window.items())[:top_k])
            for name, listed in (("floored_nll", stored), ("target_floored_nll", own)):
                found[name].append(-math.log(max(listed.get(gold, 0.0) / sum(listed.values()), TEACHER_FLOOR)))
    return found


def assert_judged(health, expected: dict[str, list[float]], prefix: str = "") -> None:
    excluded = sum(map(math.isinf, expected["completed_nll"]))
    assert health[f"{prefix}gold_excluded"] == excluded
    for name, values in expected.items():
        finite = [value for value in values if math.isfinite(value)]
        assert health[prefix + name].count == len(finite)
        assert health[prefix + name].total == pytest.approx(sum(finite), rel=2e-3)


def test_teacher_nll_is_that_of_the_stored_rows(inputs):
    output = inputs.stage(top_k=2, function="avg-ce").run(inputs.tables)
    expected = judged_by_hand(inputs, output.table, top_k=2)
    assert output.health["chosen_by_gold"] == output.health["chosen_by_gold/floored_nll"].count == 0
    assert len(expected["floored_nll"]) == output.health["fused"] > 20
    is_bucket = "tail_mass" in output.table.schema.names
    assert is_bucket == all(map(math.isfinite, expected["completed_nll"]))
    assert_judged(output.health, expected)


def test_the_target_s_own_rows_have_the_target_s_nll(inputs):
    alone = replace(inputs, sources=(), tables={"logits/target": inputs.tables["logits/target"]})
    health = alone.stage().run(alone.tables).health
    assert health["floored_nll"] == health["target_floored_nll"]
    assert health["target_exact_nll"].count == health["fused"]


def test_choices_by_the_gold_token_are_judged_apart(inputs):
    output = inputs.stage(granularity="token").run(inputs.tables)
    expected = judged_by_hand(inputs, output.table, top_k=10)
    health = output.health
    assert health["chosen_by_gold"] + health["floored_nll"].count == health["fused"] == len(expected["floored_nll"])
    assert health["chosen_by_gold"] > health["floored_nll"].count > 0, (
        "where the target alone has a row there is no choice"
    )
    for name in ("floored_nll", "target_floored_nll", "target_exact_nll"):
        apart = health[f"chosen_by_gold/{name}"]
        assert (apart + health[name]).total == pytest.approx(sum(expected[name]), rel=2e-3)
    assert health["chosen_by_gold/floored_nll"].value < health["chosen_by_gold/target_floored_nll"].value


def test_rows_that_are_the_gold_token_are_judged_apart(inputs):
    table = inputs.tables["align/one"]
    schema = table.schema
    outcomes = [np.full(len(row), PAIRED_BY.index("gold")) for row in table["outcome"].to_pylist()]
    gold = {
        **inputs.tables,
        "align/one": table.set_column(
            schema.get_field_index("outcome"), schema.field("outcome"), list_column(outcomes, pa.uint8())
        ),
    }
    stage = inputs.stage()
    before, health = stage.run(inputs.tables).health, stage.run(gold).health
    assert health["chosen_by_gold"] == before["chosen/one"] == health["chosen/one"] > 0
    assert health["floored_nll"].count == health["fused"] - health["chosen/one"]
    both = health["floored_nll"] + health["chosen_by_gold/floored_nll"]
    assert both.total == pytest.approx(before["floored_nll"].total)


def test_one_source_works_and_where_it_has_nothing_the_target_is_taken(inputs):
    fewer = replace(inputs, sources=inputs.sources[1:])
    output = fewer.stage().run(fewer.tables)
    absent = [
        position
        for block in range(output.table.num_rows)
        for position in range(len(list_row(output.table, "chosen", block)))
        if (place := locate(output.table, block, position)).doc_id == 3
        and place.segment == 1
        and list_row(output.table, "chosen", block)[position] == 1
    ]
    assert absent == []
    assert output.health["missing_source_segments"] == 1


@pytest.mark.parametrize("granularity", ["document", "token"])
def test_self_distillation_takes_the_target_s_own_rows_whatever_the_sources_say(inputs, granularity):
    stage = inputs.stage(packing="whole", max_length=64, function="target", granularity=granularity)
    target = inputs.tables["logits/target"]
    tail = "bucket" if "tail_mass" in inputs.tables["align/one"].schema.names else "renormalise"
    for row, fused in enumerate(stage.fused_segments(inputs.tables, range(len(SEGMENTS)))):
        assert (fused.chosen[:-1] == 0).all()
        assert fused.chosen[-1] == -1, "the last position has no next token"
        assert not fused.chosen_by_gold.any()
        own = sparse_row(target, row)
        for position in range(len(fused.chosen) - 1):
            total = 1.0 if tail == "bucket" else sum(entries(own, position).values())
            expected = {token: prob / total for token, prob in entries(own, position).items()}
            assert entries(fused.mixture.rows, position) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("function", ["min-ce", "avg-ce"])
def test_only_the_gold_token_is_learnt_where_no_source_has_a_distribution(inputs, function):
    own, none = (
        list(
            inputs.stage(packing="whole", max_length=64, function=function, uncovered=uncovered).fused_segments(
                inputs.tables, range(len(SEGMENTS))
            )
        )
        for uncovered in ("target", "none")
    )
    num_uncovered = 0
    for before, after in zip(own, none, strict=True):
        covered = np.any([part.rows.present for part in before.candidates[1:]], axis=0)
        num_uncovered += int((before.present & ~covered).sum())
        assert np.array_equal(after.present, before.present & covered)
        assert np.array_equal(after.chosen[covered], before.chosen[covered])
        assert (after.chosen[~covered] == -1).all()
        assert np.array_equal(after.mixture.rows.ids[covered], before.mixture.rows.ids[covered])
    assert num_uncovered > 0


def test_sources_with_different_tails_are_refused(tmp_path):
    made = make_inputs(tmp_path / "a", tail="bucket")
    other = make_inputs(tmp_path / "b", tail="renormalise")
    made.tables["align/two"] = other.tables["align/two"]
    with pytest.raises(ValueError, match="different tails"):
        made.stage().run(made.tables)


def test_aligned_rows_of_other_lengths_are_refused(tmp_path):
    made = make_inputs(tmp_path, tail="renormalise", missing=False)
    table = made.tables["align/one"]
    order = [1, 0, 2, 3]
    keys = {"doc_id": table["doc_id"], "segment": table["segment"]}
    moved = table.take(order)
    made.tables["align/one"] = pa.table(
        [keys.get(name, moved[name]) for name in table.schema.names], schema=table.schema
    )
    with pytest.raises(ValueError, match="run `make align`"):
        made.stage().run(made.tables)


def test_an_empty_shard_gives_an_empty_table(inputs):
    empty = {name: table.slice(0, 0) for name, table in inputs.tables.items()}
    output = inputs.stage().run(empty)
    assert output.table.num_rows == output.num_tokens == 0
    assert output.health["floored_nll"].count == output.health["completed_nll"].count == 0


@pytest.mark.parametrize("granularity", ["document", "segment", "token", "block"])
def test_explain_shows_what_run_wrote(inputs, granularity):
    stage = inputs.stage(granularity=granularity, function="avg-ce")
    table = stage.run(inputs.tables).table
    vocabulary = SegmentTokenizer.load(inputs.target).vocabulary
    for block, position in [(0, 0), (0, 7), (1, 3), (2, 5)]:
        place = locate(table, block, position)
        row = find_row(inputs.tables["logits/target"], place.doc_id, place.segment)
        shown = stage.explain(inputs.tables, row, place.position)
        written = entries(sparse_row(table, block), position)
        chosen = int(list_row(table, "chosen", block)[position])
        assert shown.chosen == (None if chosen < 0 else ("target", "one", "two")[chosen])
        assert [prob for _, prob in shown.fused] == pytest.approx(list(written.values()), rel=5e-3)
        assert [text for text, _ in shown.fused] == [vocabulary.text(token) for token in written]
        assert [candidate.name for candidate in shown.candidates] == ["target", "one", "two"]
        total = sum(candidate.weight for candidate in shown.candidates)
        assert total == pytest.approx(1.0 if shown.fused else 0.0)


def test_places_outside_the_shard_are_refused(inputs):
    stage = inputs.stage()
    table = stage.run(inputs.tables).table
    with pytest.raises(IndexError, match="no block"):
        locate(table, table.num_rows, 0)
    with pytest.raises(IndexError, match="no position"):
        locate(table, 0, 16)
    with pytest.raises(IndexError, match="no position"):
        stage.explain(inputs.tables, 0, 4000)
    with pytest.raises(KeyError, match="not in this shard"):
        find_row(inputs.tables["logits/target"], 99, 0)


def test_fused_segments_are_what_run_writes(inputs):
    stage = inputs.stage(granularity="block")
    table, target = stage.run(inputs.tables).table, inputs.tables["logits/target"]
    starts = np.append(0, np.cumsum([len(target["token_ids"][row]) for row in range(target.num_rows)]))
    chosen = np.concatenate([list_row(table, "chosen", block) for block in range(table.num_rows)])
    rows = [2, 0]
    for row, found in zip(rows, stage.fused_segments(inputs.tables, rows), strict=True):
        assert found.chosen.tolist() == chosen[starts[row] : starts[row + 1]].tolist()


def test_positions_shortly_behind_a_cut_have_no_fused_distribution_and_are_counted(inputs):
    whole, cut = (inputs.stage(packing="cut", min_context=number).run(inputs.tables) for number in (0, 3))
    num_short = 0
    for block in range(cut.table.num_rows):
        starts, offsets = (list_row(cut.table, name, block) for name in ("piece_start", "piece_offset"))
        before, after = (sparse_row(part.table, block).present for part in (whole, cut))
        near = np.zeros(len(after), bool)
        for start, offset in zip(starts, offsets, strict=True):
            near[start : start + 3] |= offset > 0
        assert (after == before & ~near).all()
        num_short += int((near & before).sum())
    assert num_short > 0
    assert cut.health["short_context"] >= num_short
    assert whole.health["short_context"] == 0


def test_whole_segments_have_the_rows_that_they_have_anyhow(inputs):
    """Packing moves rows; it does not change them."""
    cut, whole = (inputs.stage(packing=packing, max_length=64, min_context=0) for packing in ("cut", "whole"))
    outputs = [stage.run(inputs.tables) for stage in (cut, whole)]

    def rows(table: pa.Table) -> dict[tuple[int, int, int], list]:
        found = {}
        for block in range(table.num_rows):
            sparse, ids = sparse_row(table, block), list_row(table, "token_ids", block)
            for position in range(len(ids)):
                place = locate(table, block, position)
                key = (place.doc_id, place.segment, place.position)
                found[key] = [int(ids[position]), sparse.ids[position].tolist(), sparse.logprobs[position].tolist()]
        return found

    assert rows(outputs[0].table) == rows(outputs[1].table)
    assert not any(list_row(outputs[1].table, "piece_offset", row).any() for row in range(outputs[1].table.num_rows))
    fill = outputs[1].health["block_fill"]
    assert fill.value == outputs[1].num_tokens / (outputs[1].table.num_rows * 64)
