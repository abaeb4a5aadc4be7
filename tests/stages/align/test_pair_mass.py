"""Which token's mass went where: a hand-made plan, and the aligned shard that the same plans gave."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stages.align import pair_mass
from stages.align.config import AlignConfig
from stages.align.pair_mass import PairSums
from stages.align.stage import AlignStage
from stages.align.transport.moved_mass import text_numbers
from stages.align.transport.projection import column_mass, landed_mass
from stages.align.transporter import TransportBatch
from stages.contract.columns import sparse_row
from stages.models.config import ModelConfig
from stages.models.tokenizer import SegmentTokenizer
from stages.models.vocabulary import Vocabulary
from tests.stages.align.synthetic import logits_table
from tests.tiny_tokenizers import TEXTS, save_tokenizer

DOCUMENTS = ((TEXTS[0], TEXTS[1]), (TEXTS[4],), (TEXTS[9],))


@pytest.fixture(scope="module")
def align_stage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    models = {
        family: ModelConfig(name=family, path=save_tokenizer(family, folder / family))
        for family in ("spm-bpe", "byte-bpe")
    }
    tables = {
        name: logits_table(SegmentTokenizer.load(model), DOCUMENTS, seed=len(name)) for name, model in models.items()
    }

    def of(source: str = "byte-bpe", **chosen):
        stage = AlignStage(AlignConfig(**chosen), models["spm-bpe"], models[source])
        stage.setup()
        return stage, {"target": tables["spm-bpe"], "source": tables[source]}

    return of


def vocabulary(*texts: str, special: int = 0) -> Vocabulary:
    size = len(texts)
    return Vocabulary(
        tuple(text.encode() for text in texts),
        np.zeros(size, bool),
        np.arange(size) < special,
        bos_id=None,
        eos_id=None,
    )


SOURCE = vocabulary("<eos>", "a", " the", " inter", special=1)
TARGET = vocabulary("<eos>", " international", " the", "a", "b", special=1)


def problems_of(source_ids, support_ids, plan) -> TransportBatch:
    plan = np.array(plan, np.float64)
    count, (n, m) = len(plan), plan.shape[1:]
    numbers = text_numbers(SOURCE, TARGET)
    return TransportBatch(
        positions=np.arange(count),
        source_ids=np.array(source_ids, np.int32),
        source_mass=plan.sum(axis=2),
        support_ids=np.array(support_ids, np.int32),
        prior=np.full((count, m), 1 / m),
        cost=np.zeros((count, n, m)),
        plan=plan,
        marginal_error=np.zeros(count),
        converged=np.ones(count, bool),
        mass_moved=np.zeros(count),
        same_text=numbers[0][np.array(source_ids)][:, :, None] == numbers[1][np.array(support_ids)][:, None, :],
    )


def sums_of(*parts: tuple[TransportBatch, np.ndarray]) -> dict[tuple[int, int], tuple[float, bool]]:
    sums = PairSums(TARGET)
    for problems, landed in parts:
        sums.add(problems, landed)
    found = sums.result()
    assert (np.diff(found.mass) <= 0).all()
    columns = (found.source_ids, found.target_ids, found.mass, found.is_same)
    return {(s, t): (mass, same) for s, t, mass, same in zip(*(column.tolist() for column in columns), strict=True)}


def test_mass_adds_up_by_pairs_of_tokens_over_positions():
    first = problems_of([[2, 3]], [[2, 1]], [[[0.5, 0.1], [0.0, 0.3]]])
    second = problems_of([[3, 1], [0, -1]], [[1, 3], [0, -1]], [[[0.2, 0.1], [0.0, 0.4]], [[0.9, 0.0], [0.0, 0.0]]])
    found = sums_of((first, first.plan), (second, second.plan))
    assert found == {
        (0, 0): (pytest.approx(0.9), True),  # both are EOS
        (2, 2): (pytest.approx(0.5), True),
        (3, 1): (pytest.approx(0.5), False),
        (1, 3): (pytest.approx(0.4), True),
        (2, 1): (pytest.approx(0.1), False),
        (3, 3): (pytest.approx(0.1), False),
    }


def test_few_pairs_at_a_time_give_the_same(monkeypatch):
    parts = [problems_of([[2, 3]], [[2, 1]], [[[0.5, 0.1 * index], [0.0, 0.3]]]) for index in range(5)]
    whole = sums_of(*((part, part.plan) for part in parts))
    monkeypatch.setattr(pair_mass, "_PENDING_PAIRS", 1)
    found = sums_of(*((part, part.plan) for part in parts))
    assert found == {pair: (pytest.approx(mass), same) for pair, (mass, same) in whole.items()}


@given(hnp.arrays(np.float64, (3, 4, 5), elements=st.floats(0, 1)), st.sampled_from(["argmax", "plan"]))
@settings(max_examples=50)
def test_what_lands_adds_up_to_the_projected_mass(plan, projection):
    landed = landed_mass(plan, projection)
    np.testing.assert_allclose(landed.sum(axis=1), column_mass(plan, projection), atol=1e-12)
    if projection == "argmax":
        assert ((landed > 0).sum(axis=2) <= 1).all()


@pytest.mark.parametrize(
    "settings_of_align",
    [
        {"preset": "paper", "inexact": "mask", "tail": "renormalise"},
        {"preset": "semi-relaxed", "tail": "renormalise", "top_k": 4},
        {"method": "min-edit", "inexact": "mask", "tail": "renormalise"},
    ],
)
def test_pairs_of_a_shard_are_those_of_its_rows(align_stage, settings_of_align):
    stage, inputs = align_stage(**settings_of_align)
    output = stage.run(inputs)
    pairs = stage.pair_mass(inputs, range(inputs["target"].num_rows))
    assert pairs.num_positions == output.health["covered"] > 50
    moved, total = pairs.mass[~pairs.is_same].sum(), pairs.mass.sum()
    assert total == pytest.approx(output.health["covered"])  # every row has the mass 1
    assert moved / total == pytest.approx(output.health["mass_moved"].value, abs=1e-9)
    by_target = np.bincount(pairs.target_ids, pairs.mass)
    stored = np.zeros(len(by_target))
    for row in range(output.table.num_rows):
        found = sparse_row(output.table, row)
        known = found.ids >= 0
        np.add.at(stored, found.ids[known], np.exp(found.logprobs[known]))
    cut = output.health["cut_mass"].total
    assert np.abs(stored - by_target).sum() <= 2 * cut + 0.01 * total


def test_rows_add_up_and_unknown_ones_are_refused(align_stage):
    stage, inputs = align_stage(preset="semi-relaxed")
    every = range(inputs["target"].num_rows)
    whole = stage.pair_mass(inputs, every)
    assert sum(stage.pair_mass(inputs, [row]).mass.sum() for row in every) == pytest.approx(whole.mass.sum())
    with pytest.raises(ValueError, match="row 99: expected 0 to"):
        stage.pair_mass(inputs, [99])


def test_equal_vocabularies_move_nothing(align_stage):
    stage, inputs = align_stage(source="spm-bpe", preset="semi-relaxed")
    pairs = stage.pair_mass(inputs, range(inputs["target"].num_rows))
    assert pairs.is_same.all()
    assert pairs.num_positions == stage.run(inputs).health["covered"] > 50
