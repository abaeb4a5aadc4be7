"""Lengths of time as people write them."""

import pytest

from pipeline.display.durations import DAY_SECONDS, format_duration, format_estimate, parse_duration


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("1d", DAY_SECONDS)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "1", "h", "1 day", "-1d", "1w"])
def test_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration: give a number with s, m, h or d"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (320, "5 min 20 s"),
        (7800, "2 h 10 min"),
        (86_399.9, "1 d 0 h"),
        (273_600, "3 d 4 h"),
    ],
)
def test_lengths_are_shown_in_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, ""),
        (0.001, "< 0.1 s"),
        (0.3564, "0.36 s"),
        (4.2, "4.2 s"),
        (42, "42 s"),
        (59.9, "60 s"),
        (1260, "21 min"),
        (3 * 3600, "3 h"),
        (3.24 * 3600, "3.2 h"),
        (1480 * 3600, "1,480 h"),
    ],
)
def test_estimates_have_one_unit_and_two_digits(seconds: float, text: str) -> None:
    assert format_estimate(seconds) == text
