"""Progress of one step: shards, tokens per second and ETA; a live bar in a terminal, plain lines elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pipeline.display.durations import format_duration
from pipeline.engine.worker import ShardStatus

PLAIN_LINE_SECONDS = 10.0


class StepProgress:
    """Counter of the shard statuses of one step, with its display."""

    def __init__(self, console: Console, label: str, num_shards: int, num_done: int) -> None:
        """Start counting.

        Args:
            console: console to show it on.
            label: the step's key.
            num_shards: shards of the step.
            num_done: number of shards that were done before this command.
        """
        self._console = console
        self._label = label
        self._num_shards = num_shards
        self._num_done = num_done
        self._num_new = 0
        self._num_failed = 0
        self._num_tokens = 0
        self._started = time.monotonic()
        self._last_line = 0.0
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
            self._bar = Progress(*columns, TextColumn("{task.fields[rate]}"), console=console)
            self._task = self._bar.add_task(label, total=num_shards, completed=num_done, rate="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        else:
            todo = self._num_shards - self._num_done
            self._console.print(f"{self._label}: {todo} of {self._num_shards} shards to do", soft_wrap=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def add(self, status: ShardStatus) -> None:
        """Count a shard's status."""
        if status.outcome == "failed":
            self._num_failed += 1
        else:
            self._num_new += 1
            self._num_tokens += status.num_tokens if status.outcome == "done" else 0
        if self._bar:
            self._bar.update(self._task, completed=self._num_done + self._num_new, rate=self._rate())
            return
        now = time.monotonic()
        finished = self._num_new + self._num_failed + self._num_done >= self._num_shards
        if finished or now - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = now
            failed = f", {self._num_failed} failed" if self._num_failed else ""
            done = self._num_done + self._num_new
            self._console.print(
                f"{self._label}: {done}/{self._num_shards} shards{failed}, {self._rate()}", soft_wrap=True
            )

    def summary(self) -> str:
        """Return one line for the end of the step."""
        seconds = time.monotonic() - self._started
        return f"{self._label}: {self._num_new} shards, {self._num_tokens:,} tokens in {seconds:.1f} s"

    def _rate(self) -> str:
        seconds = time.monotonic() - self._started
        left = self._num_shards - self._num_done - self._num_new - self._num_failed
        eta = format_duration(seconds / self._num_new * left) if self._num_new else "unknown"
        return f"{self._num_tokens / seconds:,.0f} tokens/s, ETA {eta}"
