"""Rows and losses of a tiny run are those that were pinned; see ``rows.py`` for how to pin them again."""

import json
from pathlib import Path

import pytest

from tests.golden.rows import NUM_POSITIONS, NUM_STEPS, PINNED, PRESETS, compute, rows_and_losses

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_and_losses_are_the_pinned_ones(tiny_config: Path, tmp_path: Path, preset: str) -> None:
    compute(tiny_config, tmp_path / "run", preset)
    found, pinned = rows_and_losses(tmp_path / "run", preset), json.loads(PINNED.read_text())[preset]
    assert len(pinned["fuse"]) == NUM_POSITIONS
    assert len(pinned["losses"]) == NUM_STEPS
    for key in ("align/neox", "fuse"):
        for position, (here, then) in enumerate(zip(found[key], pinned[key], strict=True)):
            where = f"{key}, position {position}"
            # Machines round differently: equal entries may change places, and values move in their last digits.
            assert sorted(token for token, _ in here["row"]) == sorted(token for token, _ in then["row"]), where
            assert dict(here["row"]) == pytest.approx(dict(then["row"]), rel=5e-3, abs=2e-5), where
            assert here["tail"] == pytest.approx(then["tail"], abs=2e-4), where
    assert found["losses"] == [pytest.approx(step, rel=1e-4) for step in pinned["losses"]]
