"""Figures of the report against their definitions."""

import math

import numpy as np
import pytest

from pipeline.results import paired_difference


def evaluation(figures: list[float], sizes: list[int]) -> dict:
    return {
        "documents": [
            {"doc_id": number, "bits_per_byte": figure, "num_bytes": size}
            for number, (figure, size) in enumerate(zip(figures, sizes, strict=True))
        ]
    }


def test_paired_difference_of_equal_documents_is_the_usual_standard_error() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(1.0, 0.1, 40)
    differences = rng.normal(-0.02, 0.03, 40)
    found = paired_difference(evaluation(list(before + differences), [100] * 40), evaluation(list(before), [100] * 40))
    assert found[0] == pytest.approx(differences.mean())
    assert found[1] == pytest.approx(differences.std(ddof=1) / math.sqrt(40))


def test_paired_difference_weighs_documents_by_their_bytes() -> None:
    difference, _ = paired_difference(evaluation([1.0, 2.0], [300, 100]), evaluation([1.1, 1.0], [300, 100]))
    assert difference == pytest.approx((-0.1 * 300 + 1.0 * 100) / 400)


def test_one_document_has_no_standard_error() -> None:
    assert math.isnan(paired_difference(evaluation([1.0], [10]), evaluation([1.1], [10]))[1])
