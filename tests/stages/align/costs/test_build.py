"""COSTS lists every cost that the setting allows, and each answers as ``Costs`` says."""

from typing import get_args

import numpy as np
import pytest

from stages.align.config import AlignConfig
from stages.align.costs.build import COSTS, build_costs
from stages.align.vocabulary_maps import ModelPair
from stages.models.tokenizer import Encoding
from tests.stages.align.transport.test_support import vocabulary

SOURCE = vocabulary(b"ab", b" abc", b"x", b"<eos>")
TARGET = vocabulary(b"ab", b"abc", b"y", b" ", b"<eos>")


def no_tokens(texts: list[str]) -> list[Encoding]:
    return [Encoding(np.empty(0, np.int32), np.empty(0, np.int32)) for _ in texts]


def pair() -> ModelPair:
    return ModelPair(
        source=SOURCE,
        target=TARGET,
        source_texts=[SOURCE.text(token) for token in range(SOURCE.size)],
        target_texts=[TARGET.text(token) for token in range(TARGET.size)],
        encode=no_tokens,
        encode_source=no_tokens,
        load_embeddings=lambda: np.random.default_rng(0).normal(size=(TARGET.size, 8)),
    )


def test_every_cost_of_the_setting_is_listed() -> None:
    assert tuple(COSTS) == get_args(AlignConfig.model_fields["cost"].annotation)


@pytest.mark.parametrize("name", COSTS)
def test_every_cost_is_finite_not_negative_and_0_for_the_same_token_and_at_pads(name: str) -> None:
    source_ids, target_ids = np.array([[0, 1, 2, -1], [3, 0, 1, 2]]), np.array([[0, 1, -1], [4, 3, 2]])
    costs = build_costs(name, pair()).costs(source_ids, target_ids)
    assert costs.shape == (2, 4, 3)
    assert costs.dtype == np.float64
    assert np.isfinite(costs).all()
    assert (costs >= 0).all()
    assert costs[0, 0, 0] == costs[1, 0, 0] == 0
    assert (costs[0, 3] == 0).all()
    assert (costs[0, :, 2] == 0).all()
    assert costs[0, 1, 0] > 0


def test_a_pair_computes_only_what_a_cost_needs() -> None:
    def fail(*_: object) -> np.ndarray:
        raise AssertionError("the edit distance needs neither embeddings nor a tokenizer")

    texts = ["a", "b"]
    part = vocabulary(b"a", b"b")
    cheap = ModelPair(part, part, texts, texts, encode=fail, encode_source=fail, load_embeddings=fail)
    assert build_costs("edit-distance", cheap).costs(np.array([[0]]), np.array([[1]])).tolist() == [[[1.0]]]


def test_a_cost_of_no_known_name_is_refused() -> None:
    with pytest.raises(KeyError, match="euclidean"):
        build_costs("euclidean", pair())
