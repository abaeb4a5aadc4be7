import itertools
import math
import weakref

import numpy as np
import ot
import pyarrow as pa
import pytest

from stages.align.config import AlignConfig
from stages.align.segment import SegmentAligner
from stages.align.stage import AlignStage
from stages.contract import schemas
from stages.contract.columns import list_row, sparse_row
from stages.measures.teacher import TEACHER_FLOOR
from stages.models.config import ModelConfig
from stages.models.tokenizer import SegmentTokenizer
from tests.stages.align.costs.cutting import prefix_cost
from tests.stages.align.pairing.test_levenshtein import levenshtein
from tests.stages.align.synthetic import HALF, logits_table
from tests.tiny_tokenizers import FAMILIES, TEXTS, save_tokenizer

DOCUMENTS = (
    (TEXTS[0], TEXTS[1]),
    (TEXTS[4],),
    (TEXTS[9], "", " ", TEXTS[14]),  # no text, white space, emoji
    (TEXTS[8] + "</s> and <0x41>",),  # names of special tokens, as text
)
TAILS = ("bucket", "renormalise")
OUTCOME = {name: index for index, name in enumerate(schemas.PAIRED_BY)}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, ModelConfig]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {family: ModelConfig(name=family, path=save_tokenizer(family, folder / family)) for family in FAMILIES}


@pytest.fixture(scope="module")
def tokenizers(models) -> dict[str, SegmentTokenizer]:
    return {family: SegmentTokenizer.load(model) for family, model in models.items()}


@pytest.fixture(scope="module")
def tables(tokenizers) -> dict[str, pa.Table]:
    return {family: logits_table(tokenizer, DOCUMENTS, seed=len(family)) for family, tokenizer in tokenizers.items()}


@pytest.fixture(scope="module")
def align(models, tables):
    def run(target: str, source: str, **settings):
        stage = AlignStage(AlignConfig(**settings), models[target], models[source])
        stage.setup()
        return stage.run({"target": tables[target], "source": tables[source]})

    return run


def rows_of(table: pa.Table, tables: dict[str, pa.Table], target: str, source: str):
    """(row number, aligned columns by name, the target's and the source's logits columns by name) of each row."""

    def columns(part: pa.Table, row: int) -> dict:
        names = [name for name in part.schema.names if name not in ("doc_id", "segment", "topk_ids", "topk_logprobs")]
        found = {name: list_row(part, name, row) for name in names}
        topk = sparse_row(part, row)
        return {**found, "ids": topk.ids, "probs": np.exp(topk.logprobs.astype(np.float64))}

    for row in range(table.num_rows):
        yield row, columns(table, row), columns(tables[target], row), columns(tables[source], row)


def as_dict(ids, probs) -> dict[int, float]:
    return {int(i): float(p) for i, p in zip(ids, probs, strict=True) if i >= 0}


@pytest.mark.parametrize("preset", ["paper", "semi-relaxed"])
@pytest.mark.parametrize(("target", "source"), list(itertools.product(FAMILIES, FAMILIES)))
def test_every_pair_of_families_gives_a_sound_table(align, tables, tokenizers, target, source, preset):
    output = align(target, source, preset=preset)
    table = output.table
    tail = "bucket" if preset == "semi-relaxed" else "renormalise"
    schema = schemas.aligned_schema(tokenizers[target].vocabulary.size, tail)
    assert table.schema.equals(schema, check_metadata=True)
    table.validate(full=True)
    assert not output.quarantine
    assert table.select(["doc_id", "segment"]) == tables[target].select(["doc_id", "segment"])
    assert output.num_tokens == sum(map(len, tables[target]["token_ids"]))
    used = {"identity"} if target == source else {"transport"}
    for _, aligned, logits, _ in rows_of(table, tables, target, source):
        size = len(logits["token_ids"])
        assert {len(column) for column in aligned.values()} == {size}
        present = (aligned["ids"] >= 0).any(axis=1)
        assert ((aligned["outcome"] > 0) == present).all()
        assert ((aligned["source_position"] >= 0) == present).all()
        assert {schemas.PAIRED_BY[code] for code in aligned["outcome"]} <= {"none", *used}
        assert not present[-1:].any()  # nothing follows the last position
        total = aligned["probs"].sum(axis=1) + (aligned["tail_mass"] if tail == "bucket" else 0)
        np.testing.assert_allclose(total[present], 1.0, atol=2e-3)  # logprobs are stored rounded
        assert (np.diff(aligned["probs"], axis=1) <= 1e-12).all()
    figures = output.health
    assert figures["covered"] > 0.3 * figures["positions"]
    kinds = ("one_to_one", "one_to_many", "many_to_one", "unpaired")
    assert sum(figures[kind] for kind in kinds) == figures["positions"]
    assert figures["unconverged"] == 0
    assert figures["problems"] == (0 if target == source else figures["covered"])


@pytest.mark.parametrize("pairing", ["edit-distance", "boundary"])
def test_exact_contexts_end_at_the_same_byte(align, tables, pairing):
    table = align("spm-bpe", "byte-bpe", pairing=pairing).table
    num_exact = 0
    for _, aligned, target, source in rows_of(table, tables, "spm-bpe", "byte-bpe"):
        for position in np.flatnonzero(aligned["source_position"] >= 0):
            same = target["byte_end"][position] == source["byte_end"][aligned["source_position"][position]]
            if aligned["exact_context"][position]:
                assert same
                num_exact += 1
            start, end = aligned["pair_start"][position], aligned["pair_end"][position]
            assert start <= aligned["source_position"][position] < end
    assert num_exact > 50


def test_gold_puts_all_mass_on_the_next_token(align, tables):
    output = align("spm-bpe", "byte-bpe", pairing="boundary", inexact="gold", tail="bucket")
    num_gold = 0
    for _, aligned, target, _ in rows_of(output.table, tables, "spm-bpe", "byte-bpe"):
        size = len(target["token_ids"])
        gold = aligned["outcome"] == OUTCOME["gold"]
        assert (gold[:-1] == ~aligned["exact_context"][:-1]).all()
        assert not gold[size - 1 :].any()
        for position in np.flatnonzero(gold):
            assert as_dict(aligned["ids"][position], aligned["probs"][position]) == {
                int(target["token_ids"][position + 1]): 1.0
            }
            assert aligned["tail_mass"][position] == 0
            assert aligned["source_position"][position] == -1
        num_gold += int(gold.sum())
    assert num_gold == output.health["gold_fallback"] > 0
    assert output.health["gold_fallback"] + output.health["covered"] == output.health["positions"]


def test_mask_leaves_inexact_positions_out(align, tables):
    masked = align("spm-bpe", "byte-bpe", pairing="edit-distance", inexact="mask")
    moved = align("spm-bpe", "byte-bpe", pairing="edit-distance", inexact="transport")
    assert 0 < masked.health["covered"] == masked.health["exact_contexts"] < moved.health["covered"]
    assert moved.health["covered"] == moved.health["positions"] - moved.health["unpaired"]
    for row, aligned, _, _ in rows_of(masked.table, tables, "spm-bpe", "byte-bpe"):
        covered = aligned["outcome"] == OUTCOME["transport"]
        assert (covered[:-1] == aligned["exact_context"][:-1]).all()
        for name in ("pair_start", "pair_end", "exact_context"):
            assert (aligned[name] == list_row(moved.table, name, row)).all()


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
@pytest.mark.parametrize("preset", ["paper", "semi-relaxed"])
def test_moved_mass_is_the_source_s(align, tables, preset, tail):
    output = align(
        "byte-bpe", "spm-bpe", preset=preset, tail=tail, support="target"
    )  # <= 10 candidates: nothing is cut
    assert output.health["cut_mass"].total == 0
    for _, aligned, _, source in rows_of(output.table, tables, "byte-bpe", "spm-bpe"):
        for position in np.flatnonzero(aligned["outcome"] == OUTCOME["transport"]):
            moved = aligned["probs"][position].sum()
            of_source = source["probs"][aligned["source_position"][position]].sum()
            assert moved == pytest.approx(1.0 if tail == "renormalise" else of_source, abs=2e-3)
            if tail == "bucket":
                assert aligned["tail_mass"][position] == pytest.approx(1 - of_source, rel=HALF, abs=1e-6)


def test_cut_mass_joins_the_tail(align, tables):
    output = align("byte-bpe", "spm-bpe", preset="semi-relaxed", top_k=3)
    cut = 0.0
    for _, aligned, _, source in rows_of(output.table, tables, "byte-bpe", "spm-bpe"):
        for position in np.flatnonzero(aligned["outcome"] == OUTCOME["transport"]):
            assert (aligned["ids"][position] >= 0).sum() <= 3
            window = source["probs"][aligned["source_position"][position]][:3].sum()
            cut += aligned["tail_mass"][position] - (1 - window)
    assert cut > 0
    assert output.health["cut_mass"].total == pytest.approx(cut, rel=1e-2)
    assert output.health["cut_mass"].count == output.health["covered"]


@pytest.mark.parametrize("target", ["byte-bpe", "wordpiece"])
@pytest.mark.parametrize("preset", ["paper", "semi-relaxed"])
def test_teacher_nll_is_that_of_the_stored_distributions(align, tables, target, preset):
    output = align(target, "unigram", preset=preset)
    found = {name: [] for name in ("completed_nll", "target_exact_nll", "floored_nll", "target_floored_nll")}

    def floored(row: dict[int, float], gold: int) -> float:
        return -math.log(max(row.get(gold, 0) / sum(row.values()), TEACHER_FLOOR))

    num_rest = 0
    for _, aligned, logits, _ in rows_of(output.table, tables, target, "unigram"):
        for position in np.flatnonzero(aligned["outcome"] == OUTCOME["transport"]):
            gold = int(logits["token_ids"][position + 1])
            gold_logprob = float(logits["gold_logprob"][position])
            stored = as_dict(aligned["ids"][position], aligned["probs"][position])
            window = as_dict(logits["ids"][position], logits["probs"][position])
            found["floored_nll"].append(floored(stored, gold))
            found["target_floored_nll"].append(floored(window, gold))
            found["target_exact_nll"].append(-gold_logprob)
            if gold in stored:
                found["completed_nll"].append(-math.log(stored[gold]))
            elif preset == "semi-relaxed":
                left = 1 - sum(prob for token, prob in window.items() if token in stored)
                found["completed_nll"].append(-math.log(aligned["tail_mass"][position] / left) - gold_logprob)
                num_rest += 1
    health = output.health
    assert len(found["floored_nll"]) == health["covered"]
    assert health["gold_excluded"] == health["covered"] - len(found["completed_nll"])
    assert num_rest > 0 if preset == "semi-relaxed" else health["gold_excluded"] > 0
    for name, values in found.items():
        assert health[name].count == len(values)
        # The tail mass is stored with float16's precision.
        assert health[name].value == pytest.approx(np.mean(values), rel=1e-4 if name == "completed_nll" else 1e-6)


@pytest.mark.parametrize("top_p", [None, 0.6])
def test_the_identity_row_has_the_target_s_nll(align, tables, top_p):
    health = align("byte-bpe", "byte-bpe", preset="semi-relaxed", top_k=4, top_p=top_p).health
    assert health["covered"] > 50
    assert health["completed_nll"].count == health["target_exact_nll"].count == health["covered"]
    assert health["completed_nll"].value == pytest.approx(health["target_exact_nll"].value, rel=1e-9)
    assert health["floored_nll"] == health["target_floored_nll"]
    table = tables["byte-bpe"]
    gold = np.concatenate([list_row(table, "gold_logprob", row) for row in range(table.num_rows)])
    assert health["covered"] == np.isfinite(gold).sum()
    assert health["target_exact_nll"].value == pytest.approx(-np.nanmean(gold), rel=1e-6)


def test_floored_nll_does_not_depend_on_what_becomes_of_the_tail(align):
    bucket, rescaled = (align("spm-bpe", "unigram", preset="semi-relaxed", tail=tail).health for tail in TAILS)
    assert bucket["covered"] == rescaled["covered"]
    assert bucket["floored_nll"].value == pytest.approx(rescaled["floored_nll"].value, rel=1e-3)
    assert bucket["target_floored_nll"] == rescaled["target_floored_nll"]


def test_rows_that_are_the_gold_token_are_not_judged_by_it(align):
    masked, gold = (
        align("spm-bpe", "byte-bpe", pairing="boundary", inexact=inexact, tail="bucket").health
        for inexact in ("mask", "gold")
    )
    assert gold["gold_fallback"] > 0
    for name in ("covered", "completed_nll", "floored_nll", "target_exact_nll", "target_floored_nll"):
        assert gold[name] == masked[name]


def candidate_text(tokenizer: SegmentTokenizer, token_id: int) -> str:
    return tokenizer.vocabulary.token_bytes[token_id].decode(errors="surrogateescape")


def test_paper_preset_equals_pot_position_by_position(align, tables, tokenizers):
    target, source = "spm-bpe", "byte-bpe"
    table = align(target, source, preset="paper", epsilon=0.2, tolerance=1e-9).table
    num_compared = 0
    for row, aligned, logits, other in rows_of(table, tables, target, source):
        inside = logits["byte_end"] > 0  # the first word of a text: test_text_start.py
        for position in np.flatnonzero((aligned["outcome"] == OUTCOME["transport"]) & inside)[::7]:
            a = as_dict(*(other[name][aligned["source_position"][position]] for name in ("ids", "probs")))
            b = as_dict(logits["ids"][position], logits["probs"][position])
            cost = [
                [levenshtein(candidate_text(tokenizers[source], x), candidate_text(tokenizers[target], y)) for y in b]
                for x in a
            ]
            weights = [np.array(list(side.values())) / sum(side.values()) for side in (a, b)]
            plan = ot.sinkhorn(*weights, np.array(cost, float), 0.2, method="sinkhorn_log", stopThr=1e-12)
            expected = dict.fromkeys(b, 0.0)
            for line in plan:
                expected[list(b)[int(line.argmax())]] += line.max()
            total = sum(expected.values())
            found = as_dict(aligned["ids"][position], aligned["probs"][position])
            for token_id, mass in expected.items():
                assert found.get(token_id, 0) == pytest.approx(mass / total, rel=5e-3, abs=1e-6), (row, position)
            num_compared += 1
    assert num_compared > 20


def test_semi_relaxed_preset_equals_its_formula_position_by_position(align, tables, tokenizers):
    target, source = "byte-bpe", "spm-bpe"
    table = align(target, source, preset="semi-relaxed").table
    vocabulary = tokenizers[target].vocabulary
    id_of = {token: i for i, token in enumerate(vocabulary.token_bytes) if not vocabulary.is_special[i]}
    num_compared = 0
    for _, aligned, logits, other in rows_of(table, tables, target, source):
        inside = logits["byte_end"] > 0  # the first word of a text: test_text_start.py
        for position in np.flatnonzero((aligned["outcome"] == OUTCOME["transport"]) & inside)[::5]:
            a = as_dict(*(other[name][aligned["source_position"][position]] for name in ("ids", "probs")))
            b = as_dict(logits["ids"][position], logits["probs"][position])
            least = min(b.values())
            for x in a:
                token = tokenizers[source].vocabulary.token_bytes[x]
                if tokenizers[source].vocabulary.is_special[x]:
                    first = vocabulary.eos_id if x == tokenizers[source].vocabulary.eos_id else None
                else:
                    first = next((id_of[token[:end]] for end in range(len(token), 0, -1) if token[:end] in id_of), None)
                if first is not None:
                    b.setdefault(first, least / 2)
            expected = dict.fromkeys(b, 0.0)
            for x, mass in a.items():
                weights = {
                    y: p * math.exp(-prefix_cost(tokenizers[source], x, tokenizers[target], y) / 0.2)
                    for y, p in b.items()
                }
                for y, weight in weights.items():
                    expected[y] += mass * weight / sum(weights.values())
            kept = dict(sorted(expected.items(), key=lambda item: (-item[1], item[0]))[:10])
            found = as_dict(aligned["ids"][position], aligned["probs"][position])
            assert set(found) == set(kept)
            for y, mass in kept.items():
                assert found[y] == pytest.approx(mass, rel=1e-2)
            assert aligned["tail_mass"][position] == pytest.approx(1 - sum(kept.values()), rel=HALF, abs=1e-6)
            num_compared += 1
    assert num_compared > 20


def test_equal_tokenizers_copy_the_source(align, tables, models):
    stage = AlignStage(AlignConfig(preset="semi-relaxed"), models["byte-bpe"], models["byte-bpe"])
    stage.setup()
    other = logits_table(SegmentTokenizer.load(models["byte-bpe"]), DOCUMENTS, seed=99)
    output = stage.run({"target": tables["byte-bpe"], "source": other})
    assert output.health["covered"] == output.health["positions"] == output.health["exact_contexts"]
    for row in range(output.table.num_rows):
        copied, source = sparse_row(output.table, row), sparse_row(other, row)
        size = len(source)
        for position in range(size - 1):  # as sets: equal logprobs may stand in another order
            expected = as_dict(source.ids[position], source.logprobs[position])
            assert as_dict(copied.ids[position], copied.logprobs[position]) == pytest.approx(expected, abs=1e-6)
        assert list_row(output.table, "source_position", row)[:-1].tolist() == list(range(size - 1))


def test_equal_vocabularies_with_and_without_bos_pair_by_text(models, tables):
    without = models["spm-bpe"].model_copy(update={"bos": False})  # EOS stands before its texts
    table = logits_table(SegmentTokenizer.load(without), DOCUMENTS, seed=5)
    stage = AlignStage(AlignConfig(preset="semi-relaxed"), without, models["spm-bpe"])
    stage.setup()
    output = stage.run({"target": table, "source": tables["spm-bpe"]})
    assert output.health["covered"] == output.health["positions"]
    for row in range(table.num_rows):
        position = list_row(output.table, "source_position", row)
        assert position[:-1].tolist() == list(range(len(position) - 1))  # what stands before the text pairs with BOS


def test_segments_are_let_go_as_soon_as_their_rows_are_taken(align, tables, monkeypatch):
    """Their plans in float64 are many times what is stored: a shard of them does not fit into memory."""
    expected = align("spm-bpe", "byte-bpe").table
    alive = []

    def align_one(self, target, source, original=SegmentAligner.align):
        assert sum(segment() is not None for segment in alive) <= 1, "the one before may still be in use"
        aligned = original(self, target, source)
        alive.append(weakref.ref(aligned))
        return aligned

    monkeypatch.setattr(SegmentAligner, "align", align_one)
    assert align("spm-bpe", "byte-bpe").table.equals(expected)
    assert len(alive) > len(expected), "setup aligns one, and the stage every row"


@pytest.mark.parametrize("batch", [1, 40])
def test_rows_are_the_same_in_batches_of_any_size(align, monkeypatch, batch):
    expected = align("spm-bpe", "byte-bpe").table
    monkeypatch.setattr("stages.align.stage._OutputRows._BATCH_POSITIONS", batch)
    found = align("spm-bpe", "byte-bpe").table
    assert found["topk_ids"].num_chunks > 2
    assert found.equals(expected)


def test_a_segment_that_the_source_lacks_is_kept_without_distributions(models, tables):
    target, source = "byte-bpe", "spm-bpe"
    stage = AlignStage(AlignConfig(inexact="gold"), models[target], models[source])
    stage.setup()
    whole = stage.run({"target": tables[target], "source": tables[source]})
    shuffled = pa.concat_tables([tables[source].slice(2), tables[source].slice(0, 1)])
    output = stage.run({"target": tables[target], "source": shuffled})
    assert output.health["missing_source_segments"] == 1
    assert output.table.num_rows == tables[target].num_rows
    assert list_row(output.table, "outcome", 1).tolist() == [0] * len(list_row(tables[target], "token_ids", 1))
    assert not sparse_row(output.table, 1).present.any()
    others = [row for row in range(output.table.num_rows) if row != 1]
    assert output.table.take(others) == whole.table.take(others)


def test_a_segment_that_the_target_lacks_is_counted(models, tables):
    stage = AlignStage(AlignConfig(), models["byte-bpe"], models["spm-bpe"])
    stage.setup()
    output = stage.run({"target": tables["byte-bpe"].slice(1), "source": tables["spm-bpe"]})
    assert output.health["missing_target_segments"] == 1
    assert output.health["missing_source_segments"] == 0
    assert output.table.num_rows == tables["byte-bpe"].num_rows - 1


def test_rows_of_another_text_or_tokenizer_are_quarantined(models, tables, tokenizers):
    other_text = logits_table(tokenizers["spm-bpe"], ((TEXTS[0], TEXTS[2]), *DOCUMENTS[1:]), seed=1)
    stage = AlignStage(AlignConfig(), models["byte-bpe"], models["spm-bpe"])
    stage.setup()
    output = stage.run({"target": tables["byte-bpe"], "source": other_text})
    (bad,) = output.quarantine
    assert (bad.doc_id, bad.segment, bad.error) == (0, 1, "ValueError")
    assert "not the same segment" in bad.message
    assert output.table.num_rows == tables["byte-bpe"].num_rows - 1

    size = tokenizers["spm-bpe"].vocabulary.size
    ids = [row.as_py() for row in tables["spm-bpe"]["token_ids"]]
    ids[0][1] = size
    column = pa.array(ids, pa.list_(schemas.id_type(size)))
    index = tables["spm-bpe"].schema.get_field_index("token_ids")
    strange = tables["spm-bpe"].set_column(index, tables["spm-bpe"].schema.field(index), column)
    (bad,) = stage.run({"target": tables["byte-bpe"], "source": strange}).quarantine
    assert f"token id {size}" in bad.message


@pytest.mark.parametrize("preset", ["paper", "semi-relaxed"])
def test_a_shard_equals_its_segments_one_by_one(models, tables, preset):
    stage = AlignStage(AlignConfig(preset=preset), models["wordpiece"], models["byte-bpe"])
    stage.setup()
    inputs = {"target": tables["wordpiece"], "source": tables["byte-bpe"]}
    whole = stage.run(inputs)
    parts = [
        stage.run({name: table.slice(row, 1) for name, table in inputs.items()}).table
        for row in range(whole.table.num_rows)
    ]
    assert pa.concat_tables(parts) == whole.table
    assert stage.run(inputs).table == whole.table


def test_an_empty_shard_gives_an_empty_table(models, tables):
    stage = AlignStage(AlignConfig(preset="semi-relaxed"), models["byte-bpe"], models["spm-bpe"])
    stage.setup()
    output = stage.run({"target": tables["byte-bpe"].slice(0, 0), "source": tables["spm-bpe"].slice(0, 0)})
    assert output.table.num_rows == output.num_tokens == 0
    expected = schemas.aligned_schema(SegmentTokenizer.load(models["byte-bpe"]).vocabulary.size, "bucket")
    assert output.table.schema.equals(expected, check_metadata=True)


@pytest.mark.parametrize("preset", ["paper", "semi-relaxed"])
def test_explain_shows_what_run_stored(models, tables, tokenizers, preset):
    target, source = "byte-bpe", "spm-bpe"
    stage = AlignStage(AlignConfig(preset=preset), models[target], models[source])
    stage.setup()
    inputs = {"target": tables[target], "source": tables[source]}
    table = stage.run(inputs).table
    vocabulary = tokenizers[target].vocabulary
    for row, position in ((0, 3), (1, 10), (3, 5), (3, 20)):
        shown = stage.explain(inputs, row, position)
        stored = sparse_row(table, row)
        present = stored.ids[position] >= 0
        texts = [vocabulary.token_bytes[i].decode(errors="backslashreplace") for i in stored.ids[position][present]]
        assert [candidate.text for candidate in shown.projected] == texts
        probs = [candidate.prob for candidate in shown.projected]
        np.testing.assert_allclose(probs, np.exp(stored.logprobs[position][present]), rtol=1e-2)
        assert shown.source_position == list_row(table, "source_position", row)[position]
        assert shown.outcome == schemas.PAIRED_BY[list_row(table, "outcome", row)[position]]
        assert shown.exact_context == list_row(table, "exact_context", row)[position]
        gold = list_row(tables[target], "token_ids", row)[position + 1]
        assert shown.gold_next == vocabulary.token_bytes[gold].decode(errors="backslashreplace")
        assert position in [token.position for token in shown.context]
        for token in shown.context:
            start, end = (list_row(table, name, row)[token.position] for name in ("pair_start", "pair_end"))
            assert (token.source_start, len(token.source_texts)) == (start, end - start)
        if shown.outcome == "transport":
            assert shown.plan.shape == shown.cost.shape == (len(shown.source_topk), len(shown.support))
            assert sum(candidate.prob for candidate in shown.support) == pytest.approx(1)
            assert shown.plan.sum() + (shown.tail_mass if preset == "semi-relaxed" else 0) >= 1 - 1e-6
            for x, candidate in enumerate(shown.source_topk):
                for y, other in enumerate(shown.support):
                    if "\\x" not in candidate.text + other.text and preset == "paper":
                        assert shown.cost[x, y] == levenshtein(candidate.text, other.text)


def test_explain_of_a_position_without_distribution(models, tables):
    inputs = {"target": tables["byte-bpe"], "source": tables["spm-bpe"]}
    stage = AlignStage(AlignConfig(), models["byte-bpe"], models["spm-bpe"])
    stage.setup()
    last = len(list_row(tables["byte-bpe"], "token_ids", 0)) - 1
    shown = stage.explain(inputs, 0, last)
    assert (shown.outcome, shown.gold_next, shown.projected, shown.plan.shape) == ("none", None, (), (0, 0))
    missing = stage.explain({**inputs, "source": tables["spm-bpe"].slice(1)}, 0, 0)
    assert (missing.outcome, missing.source_position, missing.source_topk) == ("none", -1, ())
    with pytest.raises(ValueError, match=f"expected 0 to {last}"):
        stage.explain(inputs, 0, last + 1)
    with pytest.raises(ValueError, match="the rows of this shard"):
        stage.explain(inputs, 99, 0)


def test_balanced_marginals_with_plan_projection_are_refused():
    with pytest.raises(ValueError, match="target's own distribution"):
        AlignConfig(marginals="balanced", projection="plan")


def test_presets_fill_only_what_is_not_given():
    config = AlignConfig(preset="semi-relaxed", epsilon=0.2)
    assert (config.epsilon, config.marginals, config.tail) == (0.2, "source", "bucket")
    settings = config.result_settings()
    assert "preset" not in settings
    assert AlignConfig(**settings).result_settings() == settings
