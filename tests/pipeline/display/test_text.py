"""Amounts as people read them."""

import pytest

from pipeline.display.text import format_bytes


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, ""),
        (7, "7 B"),
        (5_100, "5.1 kB"),
        (59_000, "59 kB"),
        (3.5e6, "3.5 MB"),
        (5.906e9, "5.9 GB"),
        (123e9, "123 GB"),
        (2e12, "2 TB"),
    ],
)
def test_sizes_are_in_powers_of_a_thousand(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text
