"""The token-level ensemble against dense mixtures computed one position at a time, and what a source may read."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.contexts import cover, prefix_contexts, segment_contexts
from pipeline.evaluation.ensemble import EnsembleScorer, SourceRows, evaluate_ensemble
from pipeline.settings.load import load_config
from pipeline.settings.run import RunConfig
from stages.logits.backends.base import NotFiniteError
from stages.logits.backends.transformers import TransformersBackend
from stages.models.config import ModelConfig, load_model
from stages.models.tokenizer import SegmentTokenizer
from tests.tiny_models import save_model
from tests.tiny_tokenizers import TEXTS
from train.evaluate import Segment, bits_per_byte

SEGMENTS = [
    Segment(3, TEXTS[0], is_last=False),
    Segment(3, TEXTS[7], is_last=True),
    Segment(5, "", is_last=True),
    Segment(8, TEXTS[9], is_last=True),
]
VOCABULARY = 30
POSITIONS = 12


def random_rows(rng: np.random.Generator, *, tail: str, absent: tuple[int, ...] = ()) -> SourceRows:
    ids = np.stack([rng.permutation(VOCABULARY)[:5] for _ in range(POSITIONS)])
    mass = rng.dirichlet(np.ones(6 if tail == "bucket" else 5), POSITIONS)
    probs, tail_mass = mass[:, :5].copy(), mass[:, 5] if tail == "bucket" else np.zeros(POSITIONS)
    ids[2, 3:], probs[2, 3:] = -1, 0  # a short row
    if tail == "renormalise":
        probs[2] /= probs[2].sum()
    else:
        tail_mass[2] = 1 - probs[2].sum()
    for position in absent:
        ids[position], probs[position], tail_mass[position] = -1, 0, 0
    return SourceRows(torch.from_numpy(ids), torch.from_numpy(probs), torch.from_numpy(tail_mass))


def dense(source: SourceRows, own: np.ndarray) -> np.ndarray:
    """(P, V) the source's distributions by their definition."""
    found = own.copy()
    for position, (ids, probs, tail) in enumerate(zip(source.ids, source.probs, source.tail_mass, strict=True)):
        named = ids[ids >= 0].numpy()
        if len(named):
            rest = np.delete(np.arange(VOCABULARY), named)
            found[position] = 0
            found[position, rest] = float(tail) * own[position, rest] / own[position, rest].sum()
            found[position, named] = probs[: len(named)].numpy()
    return found


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("weights", [(0.5, 0.25), (0.0, 0.9), (1 / 3, 1 / 3)])
def test_the_mixture_is_the_dense_one_and_sums_to_1(tail: str, weights: tuple[float, float]) -> None:
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.normal(0, 3, (POSITIONS, VOCABULARY))).float()
    own = logits.double().softmax(dim=1).numpy()
    sources = [random_rows(rng, tail=tail, absent=(4, 7)), random_rows(rng, tail=tail, absent=(7,))]
    expected = (1 - sum(weights)) * own
    expected = expected + sum(weight * dense(source, own) for weight, source in zip(weights, sources, strict=True))
    score = EnsembleScorer(weights, sources)
    places = torch.arange(POSITIONS)
    golds = [torch.full((POSITIONS,), gold) for gold in range(VOCABULARY)]
    found = torch.stack([score(logits, gold, places) for gold in golds], dim=1).exp().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(found[7], own[7], rtol=1e-6)  # no source has a distribution there


def test_the_scorer_finds_its_rows_by_place() -> None:
    rng = np.random.default_rng(2)
    logits = torch.from_numpy(rng.normal(0, 3, (POSITIONS, VOCABULARY))).float()
    gold = torch.from_numpy(rng.integers(0, VOCABULARY, POSITIONS))
    score = EnsembleScorer((0.5,), [random_rows(rng, tail="bucket")])
    places = torch.from_numpy(rng.permutation(POSITIONS))
    whole = score(logits[places.argsort()], gold[places.argsort()], torch.arange(POSITIONS))
    torch.testing.assert_close(score(logits, gold, places), whole[places])


def test_the_tail_is_shared_out_where_the_target_leaves_next_to_nothing() -> None:
    logits = torch.tensor([[60.0, 0.0, 1.0, -30.0]])  # float32 cannot tell p of the first token from 1
    row = SourceRows(torch.tensor([[0]]), torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([0.3]).double())
    found = [
        EnsembleScorer((0.5,), [row])(logits, torch.tensor([gold]), torch.tensor([0])).exp().item() for gold in range(4)
    ]
    rest = torch.tensor([0.0, 1.0, -30.0]).double().softmax(dim=0) * 0.15
    np.testing.assert_allclose(found, [0.85, *rest.tolist()], rtol=1e-6)


@settings(max_examples=100)
@given(st.lists(st.one_of(st.none(), st.lists(st.integers(0, 2), max_size=5)), max_size=12))
def test_every_context_begins_its_sequence_and_no_sequence_another(contexts: list[list[int] | None]) -> None:
    found = cover([None if ids is None else np.array(ids, np.int32) for ids in contexts])
    for ids, sequence, position in zip(contexts, found.sequence, found.position, strict=True):
        if ids:
            assert found.sequences[sequence][: position + 1].tolist() == ids
        else:
            assert sequence == -1
    lists = [sequence.tolist() for sequence in found.sequences]
    for index, one in enumerate(lists):
        assert not any(other[: len(one)] == one for number, other in enumerate(lists) if number != index)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ensemble")
    save_model(folder / "llama", architecture="llama", tokenizer_family="spm-bpe", seed=1)
    save_model(folder / "neox", architecture="gpt_neox", tokenizer_family="byte-bpe", seed=2)
    save_model(folder / "other", architecture="gpt_neox", tokenizer_family="byte-bpe", seed=3)
    return folder


class Reader:
    """Which tokens a source reads before each position of a text, by both definitions."""

    def __init__(self, folder: Path, target: str, source: str) -> None:
        self.own, self.other = (
            SegmentTokenizer.load(ModelConfig(name=name, path=folder / name)) for name in (target, source)
        )

    def contexts(self, text: str, *, by: str) -> tuple[np.ndarray, list[list[int] | None]]:
        """Return the target's tokens, and what the source reads at each of them."""
        encoding = self.own.encode(text, is_last=False)
        if by == "prefix":
            found = prefix_contexts(text, encoding.byte_end, self.other)
        else:
            found = segment_contexts(self.other.encode(text, is_last=False), encoding.byte_end)
        read = [
            found.sequences[sequence][: position + 1].tolist() if sequence >= 0 else None
            for sequence, position in zip(found.sequence, found.position, strict=True)
        ]
        return encoding.ids, read

    def changes(self, text: str, *, by: str) -> int:
        """At how many positions more text changes what is read although the target has read the same tokens."""
        all_ids, all_read = self.contexts(text, by=by)
        changes = 0
        for cut in range(8, len(text) - 1, 3):
            ids, read = self.contexts(text[:cut], by=by)
            same = int((np.cumprod(ids[:-1] == all_ids[: len(ids) - 1]) == 1).sum())
            changes += sum(before != after for before, after in zip(read[:same], all_read[:same], strict=True))
        return changes


@pytest.mark.parametrize(("target", "source"), [("neox", "llama"), ("llama", "neox")])
@pytest.mark.parametrize("text", [TEXTS[1], TEXTS[7], TEXTS[9]])
def test_what_a_source_reads_does_not_depend_on_the_text_to_come(
    folder: Path, target: str, source: str, text: str
) -> None:
    assert Reader(folder, target, source).changes(text, by="prefix") == 0


def test_tokens_of_the_whole_segment_depend_on_later_text(folder: Path) -> None:
    assert Reader(folder, "neox", "llama").changes(TEXTS[1], by="segment") > 0


def test_a_target_token_that_ends_inside_a_character_has_no_context(folder: Path) -> None:
    tokenizer = SegmentTokenizer.load(ModelConfig(name="llama", path=folder / "llama"))
    found = prefix_contexts("aé b", np.array([1, 2, 3, 5], np.int32), tokenizer)
    assert (found.sequence >= 0).tolist() == [True, False, True, False]


def config(folder: Path, *, target: str, source: str, **sections) -> RunConfig:
    (folder / "corpus.jsonl").write_text('{"text": "none of it is read"}\n')
    run = {
        "name": "ensemble",
        "dataset": {"path": str(folder / "corpus.jsonl")},
        "target": {"name": "target", "path": str(folder / target)},
        "sources": [{"name": "source", "path": str(folder / source)}],
        "align": {"preset": "semi-relaxed"},
        "eval": {"dtype": "float32", "device": "cpu", "batch_tokens": 200, "chunk_positions": 7},
    }
    return RunConfig.model_validate({**run, **sections})


@pytest.mark.parametrize(("target", "source"), [("neox", "llama"), ("llama", "neox")])
def test_without_weight_the_ensemble_is_the_target(folder: Path, target: str, source: str) -> None:
    run = config(folder, target=target, source=source, baselines={"ensemble_weights": [0.0]})
    found, notes = evaluate_ensemble(run, SEGMENTS, cpus=1)
    own = bits_per_byte(run.target, SEGMENTS, run.eval)
    assert found.bits_per_byte == pytest.approx(own.bits_per_byte, abs=1e-6)
    assert found.total.num_bytes == own.total.num_bytes
    assert 0 < notes["sources"]["source"]["covered"] <= notes["positions"]


def test_the_ensemble_of_a_model_with_itself_is_the_model(folder: Path) -> None:
    """Copied rows with a tail that is shared as the target shares it are the target's own distributions."""
    run = config(folder, target="neox", source="neox")
    found, notes = evaluate_ensemble(run, SEGMENTS, cpus=1)
    assert found.bits_per_byte == pytest.approx(bits_per_byte(run.target, SEGMENTS, run.eval).bits_per_byte, abs=1e-6)
    assert notes["sources"]["source"]["covered"] == notes["positions"]


@torch.no_grad()
def distributions(model: ModelConfig, ids: np.ndarray, size: int) -> np.ndarray:
    """(N, V) a model's next-token distributions, by one plain forward pass."""
    loaded = load_model(model, dtype="float32", attention=("eager",), device="cpu")
    logits = loaded(input_ids=torch.tensor(ids, dtype=torch.int64)[None]).logits[0, :, :size]
    return logits.double().softmax(dim=1).numpy()


def plain_ensemble_nats(run: RunConfig, segment: Segment, weight: float) -> float:
    """Nats of a segment with sources of the same text moved to the token of the same text (``method = "exact"``)."""
    own, other = (SegmentTokenizer.load(model) for model in run.models)
    by_text = {token: index for index, token in enumerate(own.vocabulary.token_bytes)}
    encoding = own.encode(segment.text, is_last=segment.is_last)
    p = distributions(run.target, encoding.ids, own.vocabulary.size)
    raw, nats = segment.text.encode(), 0.0
    for position, gold in enumerate(encoding.ids[1:].tolist()):
        if own.vocabulary.is_special[gold]:
            continue
        try:
            read = other.encode(raw[: encoding.byte_end[position]].decode(), is_last=False).ids
        except UnicodeDecodeError:
            read = np.zeros(0, np.int32)
        mixed = p[position]
        if len(read):
            q = distributions(run.sources[0], read, other.vocabulary.size)[-1]
            top = np.argsort(-q, kind="stable")[: run.align.top_k]
            moved = np.zeros_like(mixed)
            for candidate in top.tolist():
                token = other.vocabulary.token_bytes[candidate]
                if token in by_text:
                    moved[by_text[token]] += q[candidate]
            if moved.any():
                rest = np.where(moved > 0, 0, p[position])
                moved += (1 - moved.sum()) * rest / rest.sum()
                mixed = (1 - weight) * mixed + weight * moved
        nats -= np.log(mixed[gold])
    return nats


def test_the_ensemble_is_the_plain_mixture_computed_token_by_token(folder: Path) -> None:
    # Every token of a byte-level vocabulary has bytes of its own, so the oracle has one target for each text.
    align = {"preset": "semi-relaxed", "method": "exact", "pairing": "edit-distance", "inexact": "gold"}
    run = config(folder, target="neox", source="llama", align=align, baselines={"ensemble_weights": [0.3]})
    segments = [Segment(1, TEXTS[0][:50], is_last=False), Segment(1, TEXTS[7][:30], is_last=True)]
    found, _ = evaluate_ensemble(run, segments, cpus=1)
    expected = sum(plain_ensemble_nats(run, segment, 0.3) for segment in segments)
    assert found.total.nats == pytest.approx(expected, rel=1e-5)


def test_groups_of_segments_do_not_change_the_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(folder, target="neox", source="llama")
    whole, notes = evaluate_ensemble(run, SEGMENTS, cpus=1)
    monkeypatch.setattr("pipeline.evaluation.ensemble.TOKENS_AT_A_TIME", 1)
    parts, same_notes = evaluate_ensemble(run, SEGMENTS, cpus=1)
    assert parts.bits_per_byte == pytest.approx(whole.bits_per_byte, abs=1e-6)
    assert notes == same_notes


def test_the_whole_segments_tokens_cost_one_pass_of_the_source(folder: Path) -> None:
    run = config(folder, target="neox", source="llama", baselines={"ensemble_contexts": "segment"})
    _, notes = evaluate_ensemble(run, SEGMENTS[:1], cpus=1)
    _, causal = evaluate_ensemble(config(folder, target="neox", source="llama"), SEGMENTS[:1], cpus=1)
    whole, prefixes = notes["sources"]["source"], causal["sources"]["source"]
    assert whole["tokens_read"] <= SegmentTokenizer.load(run.sources[0]).count(TEXTS[0]) < prefixes["tokens_read"]
    assert whole["covered"] < prefixes["covered"] == causal["positions"]


def test_a_model_that_gives_no_number_ends_with_what_to_try(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def predict(self, sequences, cuts):
        raise NotFiniteError(1, 5)

    monkeypatch.setattr(TransformersBackend, "predict", predict)
    with pytest.raises(ValueError, match=r"model target: .* position 5 of sequence 1 .*eval\.dtype=float32"):
        evaluate_ensemble(config(folder, target="neox", source="llama"), SEGMENTS, cpus=1)


@pytest.mark.parametrize("weights", [[0.5], [0.5, 0.5], [0.2, 0.2, 0.2]])
def test_weights_that_do_not_fit_the_sources_are_refused(tiny_config: Path, weights: list[float]) -> None:
    sets = (f"baselines.ensemble_weights={weights}",)
    if len(weights) == 1:
        assert load_config(tiny_config, sets).baselines.source_weights("ensemble", 1) == (0.5,)
        return
    with pytest.raises(ValueError, match="expected one number for each of the 1 sources"):
        load_config(tiny_config, sets)
