import numpy as np
import pytest

from pipeline.analysis.interpret.figures import MAX_KINDS, DocumentFigures, distance_rows, win_rows
from pipeline.analysis.interpret.pairs import most_moved, summarize_pairs
from stages.align.pair_mass import PairMass
from stages.contract.columns import PAD_ID
from stages.fuse.mix import Candidate, mix
from stages.fuse.stage import FusedSegment
from stages.fuse.weights import candidate_weights
from tests.pipeline.analysis.interpret.test_distances import CROSS, sparse
from tests.stages.models.test_token_space import vocabulary


def segment_of(cross_entropy, target_rows, source_rows, gold) -> FusedSegment:
    candidates = tuple(Candidate(rows, np.zeros(len(rows))) for rows in (target_rows, source_rows))
    present = np.stack([part.rows.present for part in candidates], axis=1)
    weights = candidate_weights(np.array(cross_entropy), present, function="min-ce")
    mixture = mix(candidates, weights, top_k=4, renormalise=False)
    nowhere = np.zeros(len(gold), bool)
    next_ids = np.array(gold)
    return FusedSegment(candidates, next_ids, next_ids, np.array(cross_entropy), weights, mixture, nowhere, nowhere)


def test_figures_of_a_segment_equal_those_computed_by_hand():
    target = sparse({0: 1.0}, {0: 0.5, 1: 0.5}, {2: 0.5, 0: 0.1}, {1: 1.0}, {})
    source = sparse({0: 1.0}, {2: 1.0}, {2: 0.5}, {}, {})
    segment = segment_of([[1.0, 2.0]] * 2 + [[1.0, 1.0]] * 3, target, source, [3, 2, 2, 1, PAD_ID])
    found = DocumentFigures.of_segment(segment, CROSS)
    assert (found.num_positions, found.num_fused, found.num_contested) == (4, 4, 3)
    # By the given cross-entropy the target wins two, a tie is split, and it wins alone where the source has nothing. Token
    # by token: neither names the gold token; the source does; both give it the same; where the target is alone nobody wins.
    np.testing.assert_allclose(found.wins, [[3.5, 0.5], [1.0, 2.0]])
    assert found.num_tied.tolist() == [1, 2]
    own, aligned, fused = found.distances
    third = 1 / 6  # the tokens at 90 degrees, with 5/6 and 1/6 of the probability
    inner = 2 * 5 / 6 * third * np.sqrt(2)
    np.testing.assert_allclose(own, [4, 1 + inner, 1 + inner, 0], atol=1e-6)
    np.testing.assert_allclose(aligned, [3, 0, 1 + inner, 1 + third * np.sqrt(2)], atol=1e-6)
    np.testing.assert_allclose(fused, own, atol=1e-6)  # the target was chosen everywhere


def document(wins, distances=((1, 0, 0, 0),) * 3) -> DocumentFigures:
    count = int(sum(wins))
    return DocumentFigures(
        count + 1, count, count, np.array([0, 1]), np.array([wins, wins[::-1]], float), np.array(distances, float)
    )


def test_win_rates_are_shares_of_positions_and_sum_to_one():
    rows = win_rows([document([3, 1]), document([0, 4]), document([0, 0])], ["a", "b", "a"], ["own", "other"])
    assert [row["kind"] for row in rows] == ["all", "a", "b"]
    assert [row["num_documents"] for row in rows] == [3, 2, 1]
    assert [row["shares"]["other"]["mean"] for row in rows] == pytest.approx([5 / 8, 1 / 4, 1])
    assert [row["token_shares"]["other"]["mean"] for row in rows] == pytest.approx([3 / 8, 3 / 4, 0])
    # Two documents of 4 positions, 1/4 and 1: the standard error of their mean.
    assert rows[0]["shares"]["other"]["error"] == pytest.approx(np.std([0.25, 1], ddof=1) / np.sqrt(2))
    assert rows[1]["shares"]["other"]["error"] is None
    for row in rows:
        for key in ("shares", "token_shares"):
            assert sum(share["mean"] for share in row[key].values()) == pytest.approx(1)


def test_a_kind_without_fused_positions_has_no_share():
    rows = win_rows([document([0, 0])], ["a"], ["own", "other"])
    assert rows[1]["shares"]["own"] == {"mean": None, "error": None}


def test_many_kinds_are_counted_together_beyond_the_largest():
    parts = [document([index, 1]) for index in range(MAX_KINDS + 3)]
    rows = win_rows(parts, [f"kind {index}" for index in range(len(parts))], ["own", "other"])
    assert [row["kind"] for row in rows[-2:]] == ["kind 3", "3 other kinds"]
    assert sum(row["num_fused"] for row in rows[1:]) == rows[0]["num_fused"]


def test_distances_are_means_over_positions():
    first = document([1, 1], [(2, 1.0, 1.0, 0), (2, 0.5, 1.0, 0.25), (2, 1, 1, 1)])
    second = document([1, 1], [(6, 3.0, 3.0, 0), (0, 0, 0, 0), (6, 3, 3, 3)])
    own, aligned, fused = distance_rows([first, second], ["own", "other", "fused"])
    assert (own["num_positions"], own["inner"]["mean"]) == (8, pytest.approx(0.5))
    assert aligned["num_positions"] == 2
    assert (aligned["inner"]["mean"], aligned["own_inner"]["mean"]) == (0.25, 0.5)
    assert aligned["inner_difference"] == {"mean": -0.25, "error": None}  # one document
    assert fused["center"]["mean"] == pytest.approx(0.5)


def pair_mass(*pairs: tuple[int, int, float, bool]) -> PairMass:
    source, target, mass, is_same = (np.array(column) for column in zip(*pairs, strict=True))
    return PairMass(source, target, mass, is_same, len(pairs))


def test_pairs_of_shards_add_up_and_the_cut_mass_is_reported():
    first = summarize_pairs(pair_mass((1, 1, 3.0, True), (1, 2, 2.0, False), (2, 3, 1.0, False)), kept=1)
    second = summarize_pairs(pair_mass((2, 3, 5.0, False), (1, 2, 1.0, False)))
    names = vocabulary(5)
    found = most_moved([first, second], names, names, num_pairs=1)
    assert (found["same_mass"], found["moved_mass"], found["cut_mass"], found["num_positions"]) == (3, 9, 1, 5)
    assert found["rows"] == [
        {"source_id": 2, "target_id": 3, "source": "t2", "target": "t3", "mass": 5.0, "share": pytest.approx(5 / 9)}
    ]
