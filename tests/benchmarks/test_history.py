"""The history of the benchmarks is whole, and its drawing is that of the file."""

from pathlib import Path

import pytest

from tests.benchmarks.history import DRAWN, digest, draw, read_history


def test_history_is_in_order_and_its_units_stay() -> None:
    history = read_history()
    assert len(history) > 5
    for figure, measurements in history.items():
        assert len({(one.unit, one.better) for one in measurements}) == 1, figure
        dates = [one.date for one in measurements]
        assert dates == sorted(dates), figure


def test_drawing_is_of_this_history() -> None:
    assert f"history {digest()}" in DRAWN.read_text(encoding="utf-8"), "run `python -m tests.benchmarks.history`"


def test_a_panel_is_drawn_for_each_figure(tmp_path: Path) -> None:
    out = tmp_path / "history.svg"
    history = read_history()
    draw(history, out, "v")
    text = out.read_text(encoding="utf-8")
    assert all(figure in text for figure in history)


def test_a_wrong_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"figure": "a", "date": "yesterday"}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_history(path)
