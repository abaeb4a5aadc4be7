"""Draws from the source's tail: what they do to the aligned rows, and what they must leave alone."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from stages.align.config import AlignConfig
from stages.align.rows import ModelRows
from stages.align.stage import AlignStage
from stages.contract import schemas
from stages.contract.columns import list_row, sparse_row
from stages.contract.draws import without_draws
from stages.measures.teacher import completed_nll
from stages.models.config import ModelConfig
from stages.models.tokenizer import SegmentTokenizer
from tests.stages.align.synthetic import logits_table, save_families, with_draws
from tests.tiny_tokenizers import TEXTS

DOCUMENTS = ((TEXTS[0], TEXTS[1]), (TEXTS[4],), (TEXTS[9], "", TEXTS[14]))
NUM_DRAWS = 4
TOP_K = 6
SETTINGS = {
    "semi-relaxed": {"preset": "semi-relaxed"},
    "conditioned": {"preset": "semi-relaxed", "inexact": "condition"},
    "exact": {"method": "exact", "pairing": "boundary", "tail": "bucket"},
    "min-edit": {"method": "min-edit", "tail": "bucket"},
    "gold": {"preset": "semi-relaxed", "inexact": "gold"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, ModelConfig]:
    return save_families(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def tables(models) -> dict[str, pa.Table]:
    """Logits with draws, of every family."""
    found = {}
    for name, model in models.items():
        tokenizer = SegmentTokenizer.load(model)
        exact = logits_table(tokenizer, DOCUMENTS, top_k=TOP_K, seed=len(name))
        found[name] = with_draws(exact, num_draws=NUM_DRAWS, vocab_size=tokenizer.vocabulary.size)
    return found


def make_stage(models, target: str, source: str, **settings) -> AlignStage:
    stage = AlignStage(AlignConfig(**{"top_k": TOP_K, **settings}), models[target], models[source])
    stage.setup()
    return stage


@pytest.mark.parametrize("source", ["coarse", "spm-bpe"])
@pytest.mark.parametrize("name", SETTINGS)
def test_rows_have_the_draws_and_are_judged_without_them(models, tables, name, source):
    stage = make_stage(models, "spm-bpe", source, **SETTINGS[name])
    inputs = {"target": tables["spm-bpe"], "source": tables[source]}
    exact = {key: without_draws(table) for key, table in inputs.items()}
    found, expected = stage.run(inputs), stage.run(exact)
    size = SegmentTokenizer.load(models["spm-bpe"]).vocabulary.size
    assert found.table.schema.equals(schemas.aligned_schema(size, "bucket", has_draws=True), check_metadata=True)
    found.table.validate(full=True)
    assert not found.quarantine
    num_wider = 0
    for row in range(found.table.num_rows):
        wide, narrow = sparse_row(found.table, row), sparse_row(expected.table, row)
        own = sparse_row(exact["target"], row)
        probs = np.exp(wide.logprobs.astype(np.float64))
        tail = list_row(found.table, "tail_mass", row)
        assert (wide.present | ~narrow.present).all(), "draws take no distribution away"
        assert wide.ids.shape[1] <= TOP_K + NUM_DRAWS
        assert (np.diff(probs, axis=1) <= 0).all()
        np.testing.assert_allclose((probs.sum(axis=1) + tail)[wide.present], 1.0, atol=2e-3)
        num_wider += int(((wide.ids >= 0).sum(axis=1) > (narrow.ids >= 0).sum(axis=1)).sum())
        # By definition: what a reader of the aligned table without draws computes.
        gold = np.append(list_row(exact["target"], "token_ids", row)[1:].astype(np.int64), -1)
        nll = completed_nll(
            narrow.ids,
            np.exp(narrow.logprobs.astype(np.float64)),
            list_row(expected.table, "tail_mass", row).astype(np.float64),
            gold,
            own_ids=own.ids,
            own_probs=np.exp(own.logprobs.astype(np.float64)),
            own_gold_logprob=list_row(exact["target"], "gold_logprob", row),
        )
        judged = list_row(found.table, "completed_logprob", row)
        np.testing.assert_array_equal(judged, -nll.astype(np.float32))
        assert (np.isfinite(judged) == narrow.present).all()
    assert num_wider > 20
    for figure in found.health:
        if "nll" in figure or "entropy" in figure or figure in ("gold_excluded", "gold_fallback", "positions"):
            assert found.health[figure] == expected.health[figure], figure
    assert found.health["mass_moved"] != expected.health["mass_moved"] or source == "spm-bpe"


def test_the_target_s_draws_are_not_read(models, tables):
    stage = make_stage(models, "spm-bpe", "coarse", preset="semi-relaxed")
    inputs = {"target": tables["spm-bpe"], "source": tables["coarse"]}
    found = stage.run(inputs).table
    assert stage.run({**inputs, "target": without_draws(inputs["target"])}).table.equals(found)
    only_target = stage.run({**inputs, "source": without_draws(inputs["source"])}).table
    assert "completed_logprob" not in only_target.schema.names


def test_draws_are_refused_without_a_tail(models, tables):
    stage = make_stage(models, "spm-bpe", "coarse", preset="paper")
    with pytest.raises(ValueError, match=r"coarse have draws from the tail .* set align.tail = 'bucket'"):
        stage.run({"target": tables["spm-bpe"], "source": tables["coarse"]})


@pytest.mark.parametrize("name", SETTINGS)
def test_an_explained_position_is_the_stored_row(models, tables, name):
    stage = make_stage(models, "spm-bpe", "coarse", **SETTINGS[name])
    inputs = {"target": tables["spm-bpe"], "source": tables["coarse"]}
    table = stage.run(inputs).table
    stored = sparse_row(table, 0)
    explained = stage.explain_row(inputs, 0)
    for position, one in enumerate(explained):
        probs = np.exp(stored.logprobs[position][stored.ids[position] >= 0])
        assert [part.prob for part in one.projected] == pytest.approx(probs.tolist(), rel=2e-2, abs=1e-6)
        assert len(one.target_topk) <= TOP_K
    if name != "gold":
        assert max(len(one.source_topk) for one in explained) > TOP_K
    pairs = stage.pair_mass(inputs, [0])
    assert pairs.mass.sum() == pytest.approx(
        sum(part.prob for one in explained if one.outcome != "gold" for part in one.projected), rel=0.05
    )


def full_source(table: pa.Table, row: int) -> ModelRows:
    """A row whose entries are all of the vocabulary that has any probability."""
    window = sparse_row(table, row)
    probs = np.exp(window.logprobs.astype(np.float64))
    total = probs.sum(axis=1, keepdims=True)
    return ModelRows(
        token_ids=list_row(table, "token_ids", row).astype(np.int32),
        byte_end=list_row(table, "byte_end", row).astype(np.int32),
        topk_ids=window.ids,
        topk_probs=np.divide(probs, total, out=np.zeros_like(probs), where=total > 0),
    )


def sampled(full: ModelRows, rng: np.random.Generator) -> ModelRows:
    """Return the largest ``TOP_K`` entries, and draws from the others, one position at a time."""
    draws = np.full((len(full), NUM_DRAWS), -1, np.int32)
    for position, (ids, probs) in enumerate(zip(full.topk_ids[:, TOP_K:], full.topk_probs[:, TOP_K:], strict=True)):
        if probs.sum() > 0:
            draws[position] = np.sort(rng.choice(ids, NUM_DRAWS, p=probs / probs.sum()))
    exact = replace(full, topk_ids=full.topk_ids[:, :TOP_K], topk_probs=full.topk_probs[:, :TOP_K])
    return exact.with_draws(draws)


def dense(ids: np.ndarray, probs: np.ndarray, size: int) -> np.ndarray:
    found = np.zeros((len(ids), size + 1))
    np.put_along_axis(found, np.where(ids < 0, size, ids).astype(np.int64), probs, axis=1)
    return found[:, :-1]


@pytest.mark.parametrize(
    ("source", "settings"),
    [
        ("byte-bpe", {"method": "exact", "pairing": "boundary"}),
        ("byte-bpe", {"method": "min-edit", "pairing": "boundary"}),
        # The target's own window is the whole support: then the transport is linear in the source's mass.
        ("byte-bpe", {"preset": "semi-relaxed", "support": "target"}),
        ("byte-bpe", {"preset": "semi-relaxed", "support": "target", "cost": "edit-distance", "epsilon": 0.5}),
        ("spm-bpe", {"method": "exact"}),
    ],
    ids=["exact", "min-edit", "prefix cost", "edit distance", "same vocabulary"],
)
def test_expected_row_is_the_full_distribution_s(models, source, settings):
    num_seeds = 400
    tokenizers = [SegmentTokenizer.load(models[name]) for name in ("spm-bpe", source)]
    size = tokenizers[0].vocabulary.size
    documents = ((TEXTS[0][:60],),)
    target = full_source(logits_table(tokenizers[0], documents, top_k=TOP_K, seed=1), 0)
    full = full_source(logits_table(tokenizers[1], documents, top_k=25, seed=2), 0)
    wide = make_stage(models, "spm-bpe", source, **{"tail": "bucket", **settings, "top_k": 25})
    expected = wide.align_rows(target, full)
    stage = make_stage(models, "spm-bpe", source, **{"tail": "bucket", **settings})
    rng = np.random.default_rng(3)
    rows = []
    for _ in range(num_seeds):
        aligned = stage.align_rows(target, sampled(full, rng))
        assert not aligned.cut_mass.any()
        rows.append(dense(aligned.ids, aligned.probs, size))
    assert not expected.cut_mass.any()
    found, spread = np.mean(rows, axis=0), np.std(rows, axis=0)
    right = dense(expected.ids, expected.probs, size)
    error = np.maximum(spread, 0.02) / np.sqrt(num_seeds)  # a token that was never drawn has no spread of its own
    assert np.abs((found - right) / error).max() < 6
    assert spread.max() > 0.02, "draws differ"
    assert right.sum() > 5
