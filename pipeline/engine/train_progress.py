"""Progress of the training steps, read from their log."""

import threading
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from train.job import StepRecord

POLL_SECONDS = 2.0


class TrainProgress:
    """Display of the training steps as they appear in the step log.

    Training may run in another process or on another node.

    A terminal shows a live bar; elsewhere each step is a plain line.
    """

    def __init__(self, output: Path, console: Console, label: str = "train") -> None:
        """Look at what was logged before; it is not shown again.

        Args:
            output: the job's folder.
            console: console to show the steps on.
            label: key of the step.
        """
        from train.run_log import LogFollower

        self._log = LogFollower(output)
        self._console = console
        self._label = label
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._log.read()
        self._bar: Progress | None = None
        if self._log.step:
            console.print(
                f"{label}: {self._log.step} steps were logged before; continuing from the newest checkpoint, or from "
                "the beginning if there is none",
                soft_wrap=True,
            )
        if console.is_terminal:
            columns = [TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
            self._bar = Progress(*columns, TextColumn("{task.description}"), console=console)
            self._task = self._bar.add_task("starting", total=None, completed=self._log.step)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.update()
        if self._bar:
            self._bar.stop()

    def update(self) -> None:
        """Show the steps that were logged since the last time; the bar goes back where the log did."""
        with self._lock:
            records = self._log.read()
            for record in records:
                self._show(record)
            if self._bar and not records:
                self._bar.update(self._task, completed=self._log.step)

    def _follow(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self.update()

    def _show(self, record: StepRecord) -> None:
        if self._bar:
            self._bar.update(self._task, total=record.num_steps, completed=record.step, description=_described(record))
        else:
            self._console.print(
                f"{self._label}: step {record.step}/{record.num_steps}, {_described(record)}", soft_wrap=True
            )


def _described(record: StepRecord) -> str:
    """Format the losses and the speed of a step."""
    losses_by_name = (("gold", record.loss_clm), ("fusion", record.loss_fusion))
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in losses_by_name if loss is not None)
    seconds_left = (record.num_steps - record.step) * record.num_tokens / record.step / record.tokens_per_second
    return f"loss {record.loss:.4f} ({losses}), {record.tokens_per_second:,.0f} tokens/s, ETA {seconds_left:,.0f} s"
