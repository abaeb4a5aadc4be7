"""The first token of a text, candidates that are not text, and tokens without a partner: on hand-made vocabularies."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from stages.align.config import AlignConfig
from stages.align.rows import ModelRows, Side
from stages.align.segment import GOLD, NONE, AlignedSegment, SegmentAligner
from stages.align.vocabulary_maps import ModelPair
from stages.models.tokenizer import Encoding
from stages.models.vocabulary import Vocabulary
from tests.stages.align.transport.test_support import vocabulary

DUMMY = vocabulary(b"<bos>", b"<eos>", b" The", b"The", b" cat", b" It")
PLAIN = vocabulary(b"<bos>", b"<eos>", b"The", b" The", b" cat", b"It")
"""Two ways of writing ``The cat``: with a dummy prefix before the first word, and as it is."""


@dataclass
class Model:
    """A vocabulary and what a model says after BOS and after each token of a text."""

    vocabulary: Vocabulary
    has_dummy_prefix: bool
    tokens: list[int]
    byte_end: list[int]
    predicted: dict[int, dict[int, float]]
    """Position -> id -> probability; every other position has the first of them."""
    prefix_id: int | None = 0
    texts: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.texts = tuple(self.vocabulary.text(token) for token in range(self.vocabulary.size))

    @property
    def side(self) -> Side:
        return Side("m", self.vocabulary, self.prefix_id, self.has_dummy_prefix, self.texts)

    @property
    def rows(self) -> ModelRows:
        default = next(iter(self.predicted.values()))
        rows = [self.predicted.get(position, default) for position in range(len(self.tokens))]
        width = max(map(len, rows))
        ids, probs = np.full((len(rows), width), -1, np.int32), np.zeros((len(rows), width))
        for position, row in enumerate(rows):
            ranked = sorted(row.items(), key=lambda item: -item[1])
            ids[position, : len(row)] = [token for token, _ in ranked]
            probs[position, : len(row)] = [prob for _, prob in ranked]
        return ModelRows(np.array(self.tokens, np.int32), np.array(self.byte_end, np.int32), ids, probs)


def no_tokens(texts: list[str]) -> list[Encoding]:
    return [Encoding(np.empty(0, np.int32), np.empty(0, np.int32)) for _ in texts]


def align(target: Model, source: Model, **settings: object) -> AlignedSegment:
    pair = ModelPair(
        source.vocabulary,
        target.vocabulary,
        source.texts,
        target.texts,
        encode=no_tokens,
        encode_source=no_tokens,
        load_embeddings=lambda: np.eye(target.vocabulary.size),
    )
    aligner = SegmentAligner(AlignConfig(**settings), target.side, source.side, pair)
    return aligner.align(target.rows, source.rows)


def row_of(aligned: AlignedSegment, position: int) -> dict[int, float]:
    return {
        int(token): float(prob)
        for token, prob in zip(aligned.ids[position], aligned.probs[position], strict=True)
        if token >= 0
    }


def the_cat(has_dummy_prefix: bool, *, first: dict[int, float] | None = None) -> Model:
    """``The cat``, for whose first word the model expects ``The`` (id 2) at 0.6 and ``It`` (id 5) at 0.3, or ``first``."""
    first = first or {2: 0.6, 5: 0.3}
    if has_dummy_prefix:
        return Model(DUMMY, True, [0, 2, 4], [0, 3, 7], {0: first, 1: {4: 0.9, 2: 0.05}})
    return Model(PLAIN, False, [0, 2, 4], [0, 3, 7], {0: first, 1: {4: 0.9, 3: 0.05}})


@pytest.mark.parametrize("target_dummy", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "semi-relaxed", "cost": "edit-distance", "epsilon": 0.1},
        {"preset": "semi-relaxed", "cost": "prefix", "epsilon": 0.01},
        {"preset": "semi-relaxed", "cost": "edit-distance", "epsilon": 0.1, "support": "target"},
        {"method": "exact", "pairing": "boundary", "tail": "bucket"},
        {"method": "min-edit", "pairing": "boundary", "tail": "bucket"},
    ],
    ids=["edit-distance", "prefix", "target-support", "exact", "min-edit"],
)
def test_the_first_word_is_the_same_text_with_and_without_a_dummy_prefix(target_dummy: bool, settings: dict) -> None:
    # The target itself prefers the other writing of the word, which no text begins with.
    target = the_cat(target_dummy, first={3: 0.6, 2: 0.1, 5: 0.1})
    source = the_cat(not target_dummy)
    row = row_of(align(target, source, **settings), 0)
    assert row[2] == pytest.approx(0.6, abs=0.02)  # the target's first word, however it is written
    assert row[5] == pytest.approx(0.3, abs=0.02)
    # In the middle of a text a space is a space in both.
    assert row_of(align(target, source, **settings), 1)[4] == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("support", ["union", "target"])
def test_a_special_candidate_without_counterpart_is_left_out_and_counted(support: str, tail: str) -> None:
    chat = vocabulary(b"<bos>", b"<eos>", b"The", b" The", b" cat", b"It", b"<|eot_id|>", special=(b"<|eot_id|>",))
    source = Model(chat, False, [0, 2, 4], [0, 3, 7], {0: {2: 0.6, 5: 0.4}, 1: {6: 0.6, 4: 0.3}})
    aligned = align(the_cat(False), source, preset="semi-relaxed", support=support, tail=tail, epsilon=0.05)
    row = row_of(aligned, 1)
    assert row[4] == pytest.approx(0.3 if tail == "bucket" else 1.0, abs=0.01)
    assert sum(row.values()) == pytest.approx(0.3 if tail == "bucket" else 1.0, abs=1e-6)
    assert aligned.tail_mass[1] == pytest.approx(0.7 if tail == "bucket" else 0.0, abs=1e-6)
    assert aligned.mass_special[1] == pytest.approx(0.6 / 0.9)
    assert aligned.mass_special[0] == 0


@pytest.mark.parametrize(("support", "is_moved"), [("union", True), ("target", False)])
def test_eos_is_mapped_to_eos_or_to_nothing(support: str, is_moved: bool) -> None:
    source = Model(PLAIN, False, [0, 2, 4], [0, 3, 7], {0: {2: 0.9}, 1: {1: 0.7, 4: 0.2}})
    target = Model(DUMMY, False, [0, 2, 4], [0, 3, 7], {0: {2: 0.9}, 1: {4: 0.8, 2: 0.1}})
    aligned = align(target, source, preset="semi-relaxed", support=support, epsilon=0.05)
    assert row_of(aligned, 1).get(1, 0) == pytest.approx(0.7 if is_moved else 0.0, abs=0.01)
    assert row_of(aligned, 1)[4] == pytest.approx(0.2, abs=0.01)


def test_bos_without_counterpart_stays_unpaired() -> None:
    source = Model(PLAIN, False, [2, 4], [3, 7], {0: {4: 0.9}}, prefix_id=None)
    aligned = align(the_cat(True), source, preset="paper")
    assert aligned.pairing.start.tolist() == [-1, 0, 1]
    assert aligned.outcome[0] == NONE


def test_gold_is_for_positions_whose_contexts_differ() -> None:
    """At an exact position where a hard mapping finds nothing, there is no distribution."""
    source = Model(PLAIN, False, [0, 2, 4], [0, 3, 7], {0: {2: 0.9}, 1: {5: 0.9}})  # It is no token of the target here
    target = Model(vocabulary(b"<bos>", b"<eos>", b"The", b" cat"), False, [0, 2, 3], [0, 3, 7], {0: {2: 0.9}})
    aligned = align(target, source, method="exact", pairing="boundary", inexact="gold")
    assert aligned.exact_context.all()
    assert aligned.outcome[1] == NONE
    unpaired = align(target, Model(PLAIN, False, [2, 4], [3, 7], {0: {4: 0.9}}, prefix_id=None), inexact="gold")
    assert unpaired.outcome[0] == GOLD
    assert row_of(unpaired, 0) == {2: 1.0}
