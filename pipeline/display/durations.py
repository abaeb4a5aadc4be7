"""Durations as people write them."""

import re

DAY_SECONDS = 24 * 3600.0
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": DAY_SECONDS}


def parse_duration(text: str) -> float:
    """Parse ``"30m"``, ``"12h"`` or ``"1d"`` to seconds.

    Raises:
        ValueError: it is not a duration.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration: give a number with s, m, h or d, such as 12h")
    return float(match[1]) * _SECONDS[match[2]]


def format_estimate(seconds: float) -> str:
    """Format an estimated duration: ``"0.4 s"``, ``"21 min"``, ``"3.2 h"``, ``"1,480 h"``, or nothing for 0.

    One unit and two digits, since an estimate is no more precise. Hours are the largest unit, since machines are paid
    per hour.
    """
    if not seconds:
        return ""
    if seconds < 0.05:
        return "< 0.1 s"
    for unit, size in (("h", 3_600.0), ("min", 60.0), ("s", 1.0)):
        value = seconds / size
        if value >= 1 or unit == "s":
            return f"{value:,.0f} {unit}" if value >= 9.95 else f"{value:.2g} {unit}"
    raise AssertionError("the last unit takes what is left")


def format_duration(seconds: float) -> str:
    """Format a duration in two units at most: ``"42 s"``, ``"5 min 20 s"``, ``"2 h 10 min"``, ``"3 d 4 h"``."""
    whole = round(seconds)
    for unit, size, smaller, smaller_size in (("d", 86_400, "h", 3_600), ("h", 3_600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller_size} {smaller}"
    return f"{whole} s"
