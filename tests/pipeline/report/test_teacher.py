"""The teacher NLL table, from health metrics."""

import math
from types import SimpleNamespace
from typing import Any

from pipeline.report.teacher import moved_table, teacher_rows, teacher_table
from stages.contract.manifest import Mean


def rows_of(**steps: dict[str, Any]):
    """Rows of a run whose align and fuse steps have this health."""
    run = SimpleNamespace(
        label="tiny",
        steps={
            "align/one": SimpleNamespace(folder="align/one/f", stage="align", model="one", is_sharded=True),
            "fuse": SimpleNamespace(folder="fuse/f", stage="fuse", model=None, is_sharded=True),
        },
    )
    keys = {"align": "align/one", "fuse": "fuse"}
    status = SimpleNamespace(steps=[SimpleNamespace(key=keys[name], health=health) for name, health in steps.items()])
    return teacher_rows([run], {"tiny": status})


def nll(completed: float, *, count: int, excluded: int = 0) -> dict[str, Any]:
    return {
        "completed_nll": Mean(total=completed * (count - excluded), count=count - excluded),
        "target_exact_nll": Mean(total=3.0 * count, count=count),
        "floored_nll": Mean(total=3.5 * count, count=count),
        "target_floored_nll": Mean(total=4.0 * count, count=count),
        "gold_excluded": excluded,
    }


def test_positions_that_the_gold_token_decided_have_a_row_of_their_own():
    health = {"positions": 100, "fused": 90, "chosen_by_gold": 30, **nll(2.5, count=60)}
    apart = {f"chosen_by_gold/{name}": figure for name, figure in nll(1.0, count=30).items()}
    rows = rows_of(fuse={**health, **apart})
    assert [(row.name, row.completed_nll, row.coverage) for row in rows] == [
        ("fused", 2.5, 0.6),
        ("fused, chosen by the gold token", 1.0, 0.3),
    ]
    assert len(rows_of(fuse={**health, "chosen_by_gold": 0})) == 1


def test_a_row_that_excludes_the_gold_token_has_no_finite_figure_and_says_where():
    health = {"positions": 100, "covered": 80, **nll(2.5, count=80, excluded=20)}
    (row,) = rows_of(align=health)
    assert (row.completed_nll, row.excluded, row.floored_nll) == (math.inf, 0.25, 3.5)
    table = teacher_table([row])
    assert table.rows[0][:7] == ("tiny", "aligned one", "inf", "3.000", "", "3.500", "4.000")
    assert "tiny, aligned one: 25.0%" in table.notes[0]


def test_figures_of_an_earlier_version_are_not_shown_as_something_else():
    (row,) = rows_of(align={"positions": 100, "covered": 80, "teacher_nll": Mean(total=1.0, count=80)})
    assert (row.completed_nll, row.floored_nll, row.coverage) == (None, None, 0.8)
    assert teacher_table([row]).notes == ()


def test_what_was_moved_has_a_row_for_each_alignment():
    entropies = {"source_entropy": Mean(total=100.0, count=80), "aligned_entropy": Mean(total=80.0, count=80)}
    moved = {"mass_moved": Mean(total=8.0, count=80), "exact_contexts": 90}
    rows = rows_of(align={"positions": 100, "covered": 80, **entropies, **moved}, fuse={"positions": 100, "fused": 80})
    assert moved_table(rows).rows == (("tiny", "aligned one", "90.0%", "10.0%", "1.250", "1.000"),)
