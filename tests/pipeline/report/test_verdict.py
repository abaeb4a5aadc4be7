import math

import pytest

from pipeline.report.verdict import sentence
from stages.measures.standard_error import Estimate


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        (Estimate(-0.02, 0.005), "is better than gold tokens only by 0.0200 ± 0.0050 bits per byte (2.0%)"),
        (Estimate(0.02, 0.005), "is worse than gold tokens only by 0.0200 ± 0.0050 bits per byte (2.1%)"),
        (
            Estimate(-0.02, 0.01),
            "and gold tokens only are equal within two standard errors (difference 0.0200 ± 0.0100",
        ),
        (Estimate(0.0, 0.0), "are equal within two standard errors"),
        (
            Estimate(-0.02, math.nan),
            "is better than gold tokens only by 0.0200 bits per byte (2.0%), on one document: whether that is chance",
        ),
    ],
)
def test_a_difference_is_one_beyond_two_standard_errors(difference: Estimate, said: str) -> None:
    assert said in sentence("text news", "after fused", 0.98, difference)
