"""``ptafuse inspect``: every stage, in a terminal of 100 columns."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.analysis.tables import plan_table
from pipeline.display.text import visible
from tests.tiny_run import ptafuse

pytestmark = pytest.mark.slow


def inspect(run: Path, *arguments: str) -> str:
    shown = ptafuse("inspect", str(run), *arguments).stdout
    assert max(len(line) for line in shown.splitlines()) <= 100
    return shown


def transported_position(run: Path) -> int:
    """A position of row 0 of shard 0 that has a transported distribution."""
    table = pq.read_table(next(iter(sorted(run.glob("align/neox/*/data/shard-00000*.parquet")))))
    return table["outcome"][0].as_py().index(1)


def test_aligned_position_shows_lists_plan_and_result(undisturbed_run: Path) -> None:
    position = transported_position(undisturbed_run)
    shown = inspect(undisturbed_run, "align/neox", "0", "--segment", "0", "--position", str(position))
    for part in ("neox top 10", "llama top 10", "projected", "plan, % of mass", "gold next token", "agree"):
        assert part in shown
    assert "(the rest)" in shown


def test_every_stage_has_an_overview_rows_and_positions(undisturbed_run: Path) -> None:
    assert "rows" in inspect(undisturbed_run, "shard", "0")
    assert "byte_start" in inspect(undisturbed_run, "shard", "0", "--segment", "0")
    assert "gold logprob" in inspect(undisturbed_run, "logits/neox", "0", "--segment", "0")
    assert "neox top 10" in inspect(undisturbed_run, "logits/neox", "0", "--segment", "0", "--position", "3")
    assert "source tokens" in inspect(undisturbed_run, "align", "0", "--segment", "0")
    assert "was chosen at" in inspect(undisturbed_run, "fuse", "0", "--segment", "0")
    fused = inspect(undisturbed_run, "fuse", "0", "--segment", "0", "--position", "3")
    assert "chosen:" in fused
    assert "cross-entropy" in fused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("logits", "0"), "inspect shows one of shard, logits/llama, logits/neox, align/neox, fuse, not 'logits'"),
        (("align", "77"), "align/neox shard 77 is not done; done are: [0, 1, 2, 3, 4, 5]"),
        (("align", "0", "--segment", "999"), "has rows 0 to"),
        (("align", "0", "--segment", "0", "--position", "9999"), "has positions 0 to"),
    ],
)
def test_a_missing_step_shard_row_or_position_is_named(
    undisturbed_run: Path, arguments: tuple[str, ...], message: str
) -> None:
    refused = ptafuse("inspect", str(undisturbed_run), *arguments, check=False)
    assert refused.returncode == 1
    assert message in refused.stderr


def test_white_space_and_broken_characters_are_visible() -> None:
    assert visible(" a\n\t") == "·a⏎⇥"
    assert visible(b"\xe2".decode(errors="surrogateescape")) == "<0xE2>"
    assert visible("") == "∅"
    assert visible("\x1b[2J\u202e\u00a0é") == "<U+001B>[2J<U+202E><U+00A0>é"  # nothing that a terminal would obey


def test_plan_keeps_the_columns_of_most_mass() -> None:
    values = np.zeros((2, 30))
    values[:, 7] = 0.5
    table = plan_table("plan", ["a", "b"], [f"c{number}" for number in range(30)], values)
    assert "18 columns with less mass are not shown" in str(table.title)
    assert any("c7" in str(column.header) for column in table.columns)
