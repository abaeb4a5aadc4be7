import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.engine.train_progress import TrainProgress
from tests.train.model.test_card import RECORD
from train.job import StepRecord
from train.run_log import RunLog


@pytest.mark.parametrize("terminal", [True, False])
def test_steps_are_a_bar_in_a_terminal_and_lines_elsewhere(tmp_path: Path, terminal: bool) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=120, markup=False)
    with TrainProgress(tmp_path, console), RunLog(tmp_path, step=0) as log:
        log.add(replace(RECORD, step=2))
        log.add(RECORD)
    text = shown.getvalue()
    assert "loss 2.5000 (gold 2.0000), 5 tokens/s, ETA 0 s" in text
    assert ("train: step 3/3" in text) != terminal
    assert "3/3" in text
    assert ("\x1b[" in text) == terminal


def test_steps_are_shown_from_the_first_one_computed_though_an_earlier_log_went_further(tmp_path: Path) -> None:
    """The checkpoints of an earlier log are gone, so training begins anew."""
    shown = io.StringIO()
    log_steps(tmp_path, after=0, steps=[1, 2, 3])
    with TrainProgress(tmp_path, lines_to(shown)) as progress, RunLog(tmp_path, step=0) as log:
        log.add(record(1, speed=7))
        progress.update()
        assert shown_steps(shown) == [1]
        log.add(record(2, speed=8))
    assert shown_steps(shown) == [1, 2]
    assert "3 steps were logged before" in shown.getvalue()


@pytest.mark.parametrize("looked_in_between", [True, False])
def test_steps_after_the_checkpoint_are_shown_though_they_were_logged_before(
    tmp_path: Path, looked_in_between: bool
) -> None:
    shown = io.StringIO()
    log_steps(tmp_path, after=0, steps=[1, 2, 3, 4, 5])
    with TrainProgress(tmp_path, lines_to(shown)) as progress, RunLog(tmp_path, step=2) as log:
        if looked_in_between:
            progress.update()
        for step in (3, 4, 5, 6):
            log.add(record(step, speed=7))
    assert shown_steps(shown) == [3, 4, 5, 6]


def test_steps_are_shown_again_where_a_worker_died_and_training_went_back(tmp_path: Path) -> None:
    shown = io.StringIO()
    with TrainProgress(tmp_path, lines_to(shown)) as progress:
        log_steps(tmp_path, after=0, steps=[1, 2, 3])
        progress.update()
        log_steps(tmp_path, after=1, steps=[2, 3, 4], speed=7)
        progress.update()
        progress.update()
    assert shown_steps(shown) == [1, 2, 3, 2, 3, 4]


def test_a_step_that_is_half_written_is_shown_when_it_is_whole(tmp_path: Path) -> None:
    shown = io.StringIO()
    log_steps(tmp_path, after=0, steps=[1, 2])
    whole = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").unlink()
    with TrainProgress(tmp_path, lines_to(shown)) as progress:
        progress.update()
        (tmp_path / "log.jsonl").write_bytes(whole[:-10])
        progress.update()
        assert shown_steps(shown) == [1]
        with (tmp_path / "log.jsonl").open("ab") as file:
            file.write(whole[-10:])
    assert shown_steps(shown) == [1, 2]


def test_the_bar_goes_back_with_the_log(tmp_path: Path) -> None:
    shown = io.StringIO()
    log_steps(tmp_path, after=0, steps=[1, 2, 3])
    with TrainProgress(tmp_path, Console(file=shown, force_terminal=True, width=120, markup=False)):
        log_steps(tmp_path, after=1, steps=[])
    assert "3/?" in shown.getvalue()
    assert "1/?" in shown.getvalue().rpartition("3/?")[2]


def record(step: int, *, speed: float = 5.0) -> StepRecord:
    return replace(RECORD, step=step, num_steps=9, tokens_per_second=speed)


def log_steps(folder: Path, *, after: int, steps: list[int], speed: float = 5.0) -> None:
    """Go on after a step, as training does from a checkpoint."""
    with RunLog(folder, step=after) as log:
        for step in steps:
            log.add(record(step, speed=speed))


def lines_to(file: io.StringIO) -> Console:
    return Console(file=file, force_terminal=False, width=120, markup=False)


def shown_steps(file: io.StringIO) -> list[int]:
    return [int(step) for step in re.findall(r"train: step (\d+)/9", file.getvalue())]
