"""The align stage under every method, cost, window and tail, against direct computations on real tokenizers."""

import itertools
import math

import numpy as np
import pyarrow as pa
import pytest

from stages.align.config import AlignConfig
from stages.align.costs.semantic import SemanticCosts, spell
from stages.align.rows import Side
from stages.align.stage import AlignStage
from stages.align.teacher import compare_shared
from stages.contract import schemas
from stages.contract.columns import list_row, sparse_row
from stages.measures.teacher import exact_nll, floored_nll
from stages.models.config import ModelConfig
from stages.models.embeddings import load_input_embeddings
from stages.models.tokenizer import SegmentTokenizer
from tests.stages.align.costs.cutting import prefix_cost
from tests.stages.align.pairing.test_levenshtein import levenshtein
from tests.stages.align.synthetic import HALF, logits_table
from tests.tiny_models import save_model
from tests.tiny_tokenizers import FAMILIES, TEXTS, save_tokenizer

DOCUMENTS = ((TEXTS[0], TEXTS[1]), (TEXTS[4],), (TEXTS[9], "", " ", TEXTS[14]), (TEXTS[8] + "</s> and <0x41>",))
TARGET, SOURCE = "byte-bpe", "spm-bpe"  # of the target's tokens no two have the same text
TRANSPORT = schemas.PAIRED_BY.index("transport")
GOLD = schemas.PAIRED_BY.index("gold")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, ModelConfig]:
    folder = tmp_path_factory.mktemp("models")
    found = {family: ModelConfig(name=family, path=save_tokenizer(family, folder / family)) for family in FAMILIES}
    whole = save_model(folder / "whole", tokenizer_family=TARGET, vocab_padding=5)
    return {**found, TARGET: ModelConfig(name=TARGET, path=whole)}


@pytest.fixture(scope="module")
def tokenizers(models) -> dict[str, SegmentTokenizer]:
    return {family: SegmentTokenizer.load(model) for family, model in models.items()}


@pytest.fixture(scope="module")
def tables(tokenizers) -> dict[str, pa.Table]:
    # The first word of a text, which one of the two may write with a space: test_text_start.py.
    return {
        family: logits_table(tokenizer, DOCUMENTS, seed=len(family), with_start=False)
        for family, tokenizer in tokenizers.items()
    }


@pytest.fixture(scope="module")
def align(models, tables):
    def run(target: str = TARGET, source: str = SOURCE, **settings):
        stage = AlignStage(AlignConfig(**settings), models[target], models[source])
        stage.setup()
        return stage.run({"target": tables[target], "source": tables[source]})

    return run


def positions(table: pa.Table, tables, outcome: int = TRANSPORT, target: str = TARGET, source: str = SOURCE):
    """(found distribution, tail mass, target's window, source's window, row, position) of each position."""

    def as_dict(rows, position: int) -> dict[int, float]:
        entries = zip(rows.ids[position].tolist(), rows.logprobs[position].astype(float).tolist(), strict=True)
        return {token_id: math.exp(logprob) for token_id, logprob in entries if token_id >= 0}

    for row in range(table.num_rows):
        found, own, other = sparse_row(table, row), sparse_row(tables[target], row), sparse_row(tables[source], row)
        partner = list_row(table, "source_position", row)
        tails = list_row(table, "tail_mass", row) if "tail_mass" in table.schema.names else np.zeros(len(found))
        for position in np.flatnonzero(list_row(table, "outcome", row) == outcome):
            window = as_dict(other, partner[position]) if partner[position] >= 0 else {}
            yield as_dict(found, position), tails[position], as_dict(own, position), window, row, position


def same_text_id(tokenizers, token_id: int, target: str = TARGET, source: str = SOURCE) -> set[int]:
    """Target tokens that stand for the same as a source token."""
    one, other = tokenizers[source].vocabulary, tokenizers[target].vocabulary
    return {
        y
        for y in range(other.size)
        if other.token_bytes[y]
        and other.token_bytes[y] == one.token_bytes[token_id]
        and other.is_special[y] == one.is_special[token_id]
    }


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
@pytest.mark.parametrize("method", ["min-edit", "exact", "transport"])
@pytest.mark.parametrize("pairing", ["edit-distance", "boundary"])
@pytest.mark.parametrize(
    ("target", "source"), [("byte-bpe", "unigram"), ("wordpiece", "spm-bpe"), ("unigram", "unigram")]
)
def test_every_method_gives_a_sound_table(align, tables, tokenizers, target, source, pairing, method, tail):
    output = align(target, source, method=method, pairing=pairing, tail=tail)
    schema = schemas.aligned_schema(tokenizers[target].vocabulary.size, tail)
    assert output.table.schema.equals(schema, check_metadata=True)
    output.table.validate(full=True)
    assert not output.quarantine
    figures = output.health
    assert figures["covered"] > 0.3 * figures["positions"]
    means = (
        "completed_nll",
        "target_exact_nll",
        "floored_nll",
        "target_floored_nll",
        "source_entropy",
        "aligned_entropy",
        "mass_moved",
        "mass_unmapped",
        "cut_mass",
    )
    for name in means:
        left_out = figures["gold_excluded"] if name == "completed_nll" else 0
        assert figures[name].count == figures["covered"] - left_out
        assert math.isfinite(figures[name].value)
    assert (figures["gold_excluded"] > 0) == (tail == "renormalise")
    assert figures["problems"] == (figures["covered"] if method == "transport" and target != source else 0)
    for found, tail_mass, _, _, _, _ in positions(output.table, tables, target=target, source=source):
        assert sum(found.values()) + tail_mass == pytest.approx(1, abs=2e-3)
        assert list(found.values()) == sorted(found.values(), reverse=True)


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
def test_min_edit_equals_a_search_of_the_whole_vocabulary(align, tables, tokenizers, tail):
    output = align(method="min-edit", pairing="boundary", inexact="mask", tail=tail)
    one, other = tokenizers[SOURCE].vocabulary, tokenizers[TARGET].vocabulary
    ordinary = [y for y in range(other.size) if other.token_bytes[y] and not other.is_special[y]]
    distances: dict[int, dict[int, int]] = {}

    def nearest(x: int, window: list[int]) -> int | None:
        if one.is_special[x]:
            return next(iter(same_text_id(tokenizers, x)), None)
        if x not in distances:
            distances[x] = {y: levenshtein(one.text(x), other.text(y)) for y in ordinary}
        least = min(distances[x].values())
        tied = [y for y in window if distances[x].get(y) == least]
        return tied[0] if tied else min(y for y in ordinary if distances[x][y] == least)

    num_compared = 0
    for found, tail_mass, own, window, _, _ in list(positions(output.table, tables))[::9]:
        expected: dict[int, float] = {}
        for x, prob in window.items():
            y = nearest(x, list(own))
            if y is not None:
                expected[y] = expected.get(y, 0) + prob
        total = sum(expected.values())
        scale = total if tail == "renormalise" else max(1.0, sum(window.values()))
        assert found == pytest.approx({y: prob / scale for y, prob in expected.items()}, rel=5e-3)
        assert tail_mass == pytest.approx(0 if tail == "renormalise" else 1 - total / scale, rel=HALF, abs=1e-6)
        num_compared += 1
    assert num_compared > 15


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
def test_exact_keeps_only_what_the_target_has(align, tables, tokenizers, tail):
    output = align(method="exact", pairing="boundary", inexact="mask", tail=tail)
    unmapped = []
    for found, tail_mass, _, window, _, _ in positions(output.table, tables):
        kept = {x: same_text_id(tokenizers, x) for x in window}
        mapped = sum(prob for x, prob in window.items() if kept[x])
        unmapped.append(1 - mapped / sum(window.values()))
        scale = mapped if tail == "renormalise" else max(1.0, sum(window.values()))
        expected = sorted(prob / scale for x, prob in window.items() if kept[x])
        assert sorted(found.values()) == pytest.approx(expected, rel=5e-3)
        assert set(found) <= set().union(*kept.values())
        assert tail_mass == pytest.approx(0 if tail == "renormalise" else 1 - mapped / scale, rel=HALF, abs=1e-6)
    assert output.health["mass_unmapped"].value == pytest.approx(np.mean(unmapped), rel=1e-6)
    assert output.health["mass_unmapped"].value > 0.05
    assert output.health["mass_moved"].value == 0


@pytest.mark.parametrize("method", ["min-edit", "exact"])
def test_of_equal_tokens_the_one_that_the_tokenizer_gives_is_taken(align, tables, tokenizers, method):
    table = align("spm-bpe", "unigram", method=method, top_k=1).table  # one byte may be a byte token or a piece
    vocabulary = tokenizers["spm-bpe"].vocabulary
    pieces = {token: token_id for token_id, token in enumerate(vocabulary.token_bytes) if token_id >= 259}
    num_pieces = 0
    for found, _, own, _, _, _ in positions(table, tables, target="spm-bpe", source="unigram"):
        for token_id in set(found) - set(own):
            token = vocabulary.token_bytes[token_id]
            if not vocabulary.is_special[token_id] and len(token) == 1:
                assert token_id == pieces.get(token, token_id)
                num_pieces += token in pieces
    assert num_pieces > 5


@pytest.mark.parametrize("inexact", ["gold", "mask"])
def test_a_position_of_which_nothing_is_mapped_has_no_distribution(align, tables, tokenizers, inexact):
    output = align(method="exact", pairing="boundary", inexact=inexact, top_k=1)
    table = output.table
    everywhere = align(method="min-edit", pairing="boundary", inexact=inexact, top_k=1).table
    num_empty = 0
    for _, _, _, window, row, position in positions(everywhere, tables):
        best = next(iter(window))
        outcome = list_row(table, "outcome", row)[position]
        if same_text_id(tokenizers, best):
            assert outcome == TRANSPORT
        else:
            num_empty += 1
            assert outcome == 0  # its contexts agree: "gold" is for those that do not
            assert list_row(table, "source_position", row)[position] == -1
    assert num_empty > 10


@pytest.mark.parametrize("settings", [{"preset": "paper"}, {"preset": "semi-relaxed"}, {"method": "min-edit"}])
def test_mass_moved_is_what_lands_on_another_text(align, tables, tokenizers, models, settings):
    stage = AlignStage(AlignConfig(**settings), models[TARGET], models[SOURCE])
    stage.setup()
    inputs = {"target": tables[TARGET], "source": tables[SOURCE]}
    output = stage.run(inputs)
    moved, num_positions = 0.0, 0
    for row in range(output.table.num_rows):
        aligned = stage._aligner.align(
            stage_rows(tables[TARGET], row, stage._target), stage_rows(tables[SOURCE], row, stage._source)
        )
        for index, position in enumerate(aligned.problems.positions):
            problems = aligned.problems
            if aligned.outcome[position] != TRANSPORT:
                continue
            landed = np.zeros(2)
            for x, source_id in enumerate(problems.source_ids[index]):
                row_plan = problems.plan[index, x]
                columns = [int(row_plan.argmax())] if settings.get("preset") == "paper" else range(len(row_plan))
                for y in columns:
                    same = problems.support_ids[index, y] in same_text_id(tokenizers, source_id)
                    landed += row_plan[y] * np.array([1, not same])
            moved += landed[1] / landed[0]
            num_positions += 1
    assert num_positions == output.health["mass_moved"].count
    assert output.health["mass_moved"].value == pytest.approx(moved / num_positions)
    assert 0 < output.health["mass_moved"].value < 1


def stage_rows(table: pa.Table, row: int, side: Side):
    from stages.align.stage import _model_rows

    return _model_rows(table, row, side)


def test_entropies_and_the_source_s_own_nll_are_those_of_the_stored_rows(align, tables):
    output = align(preset="semi-relaxed")
    before, after, own = [], [], []

    def entropy(probs) -> float:
        probs = np.array(list(probs)) / sum(probs)
        return float(-(probs * np.log(probs)).sum())

    for found, _, _, window, row, position in positions(output.table, tables):
        before.append(entropy(window.values()))
        after.append(entropy(found.values()))
        partner = list_row(output.table, "source_position", row)[position]
        gold = list_row(tables[SOURCE], "gold_logprob", row)[partner]
        if math.isfinite(gold):
            own.append(-gold)
    assert output.health["source_entropy"].value == pytest.approx(np.mean(before), rel=1e-6)
    assert output.health["aligned_entropy"].value == pytest.approx(np.mean(after), rel=1e-3)
    assert output.health["source_exact_nll"].count == len(own) > 0
    assert output.health["source_exact_nll"].value == pytest.approx(np.mean(own), rel=1e-6)


@pytest.mark.parametrize("method", ["transport", "min-edit", "exact"])
def test_top_p_uses_the_smallest_window_that_holds_it(align, tables, method):
    settings = {"pairing": "boundary", "inexact": "mask", "tail": "bucket", "method": method}
    narrow = align(**settings, top_p=0.5)
    wide = align(**settings)
    assert narrow.health["source_entropy"].value < wide.health["source_entropy"].value
    for found, tail_mass, own, window, _, _ in positions(narrow.table, tables):
        probs = np.array(list(window.values()))
        size = int(np.argmax(np.cumsum(probs) >= 0.5)) + 1
        assert sum(found.values()) <= probs[:size].sum() + 1e-3
        assert tail_mass >= (1 - probs[:size].sum()) * (1 - HALF) - 1e-6
        if method == "transport":  # the others have no token for some candidates
            assert tail_mass == pytest.approx(1 - probs[:size].sum(), rel=HALF, abs=1e-6)
        assert len(found) <= max(size, len(own))
    assert align(**settings, top_p=1.0).table == wide.table


def test_prefix_cost_equals_its_formula_position_by_position(align, tables, tokenizers):
    output = align(preset="semi-relaxed", support="target", cost="prefix", epsilon=0.5)

    def cost(x: int, y: int) -> float:
        return prefix_cost(tokenizers[SOURCE], x, tokenizers[TARGET], y)

    assert_semi_relaxed(list(positions(output.table, tables))[::5], cost, epsilon=0.5)


def assert_semi_relaxed(found_positions, cost, epsilon: float) -> None:
    num_compared = 0
    for found, _, own, window, _, _ in found_positions:
        expected = dict.fromkeys(own, 0.0)
        for x, mass in window.items():
            weights = {y: prior * math.exp(-cost(x, y) / epsilon) for y, prior in own.items()}
            for y, weight in weights.items():
                expected[y] += mass * weight / sum(weights.values())
        for y, mass in expected.items():
            assert found.get(y, 0) == pytest.approx(mass, rel=1e-2, abs=1e-6)
        num_compared += 1
    assert num_compared > 20


def test_semantic_cost_equals_its_formula_position_by_position(align, tables, tokenizers, models):
    output = align(preset="semi-relaxed", support="target", cost="semantic", epsilon=0.5)
    one, other = tokenizers[SOURCE].vocabulary, tokenizers[TARGET].vocabulary
    embeddings = load_input_embeddings(models[TARGET])
    assert len(embeddings) == other.size + 5
    exact = np.array([min(same_text_id(tokenizers, x), default=-1) for x in range(one.size)], np.int32)
    pieces = spell(
        one,
        other,
        exact=exact,
        encode=lambda texts: tokenizers[TARGET].encode_batch(texts, is_last=[False] * len(texts)),
    )
    texts = [other.text(y) for y in range(other.size)]
    scale = SemanticCosts(embeddings, pieces, other, texts).scale
    rows = embeddings[: other.size].astype(float)
    mean = rows[~other.is_special].mean(axis=0)

    def cost(x: int, y: int) -> float:
        part = rows[pieces.row(x)].mean(axis=0) - mean if len(pieces.row(x)) else None
        if part is None:
            return scale
        whole = rows[y] - mean
        return scale * (1 - part @ whole / np.linalg.norm(part) / np.linalg.norm(whole))

    assert_semi_relaxed(list(positions(output.table, tables))[::3], cost, epsilon=0.5)


def test_balanced_transport_takes_any_cost(align):
    for cost in ("prefix", "semantic"):
        figures = align(preset="paper", cost=cost).health
        assert figures["unconverged"] == 0
        assert figures["marginal_error"].value <= 1e-5


def test_semantic_cost_between_equal_tokenizers_reads_no_weights(models, tables):
    stage = AlignStage(AlignConfig(cost="semantic"), models["unigram"], models["unigram"])  # has no weights
    stage.setup()
    figures = stage.run({"target": tables["unigram"], "source": tables["unigram"]}).health
    rows = tables["unigram"]["topk_ids"].to_pylist()
    assert figures["covered"] == sum(bool(candidates) for row in rows for candidates in row[:-1])


@pytest.mark.parametrize("method", ["min-edit", "exact"])
def test_explain_shows_a_hard_mapping(models, tables, tokenizers, method):
    stage = AlignStage(AlignConfig(preset="semi-relaxed", method=method, top_p=0.9), models[TARGET], models[SOURCE])
    stage.setup()
    inputs = {"target": tables[TARGET], "source": tables[SOURCE]}
    table = stage.run(inputs).table
    num_shown = 0
    for _, _, _, window, row, position in list(positions(table, tables))[::11]:
        shown = stage.explain(inputs, row, position)
        assert shown.plan.shape == shown.cost.shape == (len(shown.source_topk), len(shown.support))
        assert [candidate.prob for candidate in shown.source_topk] == pytest.approx(
            list(window.values())[: len(shown.source_topk)]
        )
        assert ((shown.plan > 0).sum(axis=1) <= 1).all()
        assert shown.plan.sum() + shown.tail_mass == pytest.approx(1)
        assert (shown.cost[shown.plan > 0] == 0).all() or method == "min-edit"
        num_shown += 1
    assert num_shown > 5


def test_ways_of_aligning_are_compared_on_the_same_positions(align, tables):
    nll: dict[str, np.ndarray] = {}
    for name, pairing in itertools.product(("exact", "min-edit", "transport"), ("boundary", "edit-distance")):
        table = align(method=name, pairing=pairing).table
        parts, own, documents = [], [], []
        for row in range(table.num_rows):
            gold = np.append(list_row(tables[TARGET], "token_ids", row)[1:].astype(int), -1)
            rows = sparse_row(table, row)
            parts.append(floored_nll(rows.ids, np.exp(rows.logprobs.astype(float)), gold))
            own.append(
                exact_nll(list_row(tables[SOURCE], "gold_logprob", row), list_row(table, "source_position", row))
            )
            documents.append(np.full(len(rows), table["doc_id"][row].as_py()))
        nll[f"{name}, {pairing}"] = np.concatenate(parts)
        nll[f"source, {name}, {pairing}"] = np.concatenate(own)
    found = compare_shared(nll, documents=np.concatenate(documents), baseline="exact, boundary")
    entries = found.entries
    assert 0 < found.num_positions < sum(len(part) for part in tables[TARGET]["token_ids"])
    assert entries["source, exact, boundary"].nll == entries["source, min-edit, boundary"].nll
    assert entries["min-edit, boundary"].difference.mean != 0
    assert entries["transport, edit-distance"].coverage > entries["transport, boundary"].coverage
