import io
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.engine.train_progress import TrainProgress
from tests.train.model.test_card import RECORD
from train.run_log import RunLog


@pytest.mark.parametrize("terminal", [True, False])
def test_steps_are_a_bar_in_a_terminal_and_lines_elsewhere(tmp_path: Path, terminal: bool) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=120, markup=False)
    with TrainProgress(tmp_path, console), RunLog(tmp_path, step=0) as log:
        log.add(type(RECORD)(**{**asdict(RECORD), "step": 2}))
        log.add(RECORD)
    text = shown.getvalue()
    assert "loss 2.5000 (gold 2.0000), 5 tokens/s, ETA 0 s" in text
    assert ("train: step 3/3" in text) != terminal
    assert "3/3" in text
    assert ("\x1b[" in text) == terminal
