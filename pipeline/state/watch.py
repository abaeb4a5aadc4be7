"""``ptafuse status --watch``: all steps of a run, updated every few seconds; a live table, or plain lines."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.display.durations import format_duration
from pipeline.run.specs import ShardedStage
from pipeline.run.stage_table import stage_spec
from pipeline.state.status import RunStatus, StepStatus

log = logging.getLogger(__name__)

WINDOW_SECONDS = 600.0
"""Speeds are those of the shards that were done in this time."""
MOST_ERRORS = 5
"""Number of failed shards whose errors are shown; ``ptafuse status`` shows all."""


@dataclass(frozen=True)
class Speed:
    """Speed of a step.

    Attributes:
        tokens_per_second: tokens per second of all workers together.
        seconds_left: until the step is done, at this speed.
    """

    tokens_per_second: float
    seconds_left: float


def watch(read: Callable[[], RunStatus], console: Console, *, interval: float) -> None:
    """Show the state of a run until all of it is done, or Ctrl-C.

    Args:
        read: function that reads the current state of the run.
        console: console to print on: a live table in a terminal, otherwise one line per changed step.
        interval: seconds between two readings.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for status in _until_done(read, interval):
                live.update(_view(status, time.time()), refresh=True)
        return
    shown: dict[str, str] = {}
    for status in _until_done(read, interval):
        for key, line in _lines(status, time.time()).items():
            if shown.get(key) != line:
                shown[key] = line
                console.print(line, soft_wrap=True)
    console.print("everything is done")


def step_speed(step: StepStatus, now: float) -> Speed | None:
    """Compute the speed of a step; None if it has not begun, is done, or finished no shard lately.

    Args:
        step: state of the step.
        now: seconds since the epoch.
    """
    if step.is_done:
        return None
    if step.training:
        record = step.training
        tokens_left = (record["num_steps"] - record["step"]) * record["num_tokens"] / record["step"]
        return Speed(record["tokens_per_second"], tokens_left / record["tokens_per_second"])
    times = [(done.finished, done) for done in step.shards.values() if done.finished is not None]
    recent = [(finished, done) for finished, done in times if now - finished < WINDOW_SECONDS]
    if not recent:
        return None
    begin = max(now - WINDOW_SECONDS, min(finished - done.seconds for finished, done in recent))
    span = max(1.0, now - begin)  # a store's clock may run ahead of ours
    num_left = step.num_shards - len(step.shards)
    return Speed(sum(done.num_tokens for _, done in recent) / span, num_left * span / len(recent))


def _until_done(read: Callable[[], RunStatus], interval: float) -> Iterator[RunStatus]:
    status = read()  # a store that cannot be read at all is an error
    while True:
        yield status
        if status.next_command is None:
            return
        time.sleep(interval)
        try:
            status = read()
        except OSError as error:  # one that cannot be read now: whoever watches wants to go on watching
            log.warning("the run directory cannot be read, trying again: %s", error)


def _view(status: RunStatus, now: float) -> Group:
    table = Table(
        title=f"{status.url}  ({status.name})  {time.strftime('%H:%M:%S', time.localtime(now))}", title_justify="left"
    )
    for column in ("step", "", "done", "running", "failed", "tokens/s", "ETA"):
        table.add_column(column, justify="left" if column in ("step", "") else "right", no_wrap=True)
    for step in status.steps:
        done, total = _units(step)
        speed = step_speed(step, now)
        table.add_row(
            step.key,
            ProgressBar(total=max(total, 1), completed=done, width=20),
            f"{done:,}/{total:,}" if total else "",
            f"{len(step.running):,}" if step.running else "",
            Text(f"{len(step.failed):,}", style="red") if step.failed else "",
            f"{speed.tokens_per_second:,.0f}" if speed else "",
            format_duration(speed.seconds_left) if speed else "",
        )
    notes = [Text(f"warning: {warning}", style="yellow") for warning in status.warnings]
    errors = [(step.key, shard, error) for step in status.steps for shard, error in sorted(step.failed.items())]
    notes += [Text(f"{key} shard {shard} failed: {error}", style="red") for key, shard, error in errors[:MOST_ERRORS]]
    if len(errors) > MOST_ERRORS:
        notes.append(Text(f"and {len(errors) - MOST_ERRORS} more: `ptafuse status {status.url}`", style="red"))
    following = (
        "everything is done" if status.next_command is None else f"unless it is already running: {status.next_command}"
    )
    return Group(table, *notes, Text(following))


def _lines(status: RunStatus, now: float) -> dict[str, str]:
    """Return one line per step that has begun, and one per warning."""
    lines = {}
    for step in status.steps:
        done, total = _units(step)
        if not (done or step.running or step.failed):
            continue
        speed = step_speed(step, now)
        fields = [
            f"{done:,}/{total:,} {'steps' if step.training else 'shards'}" if total > 1 else "done",
            f"{len(step.running):,} running" if step.running else "",
            f"{len(step.failed):,} failed" if step.failed else "",
            f"{speed.tokens_per_second:,.0f} tokens/s" if speed else "",
            f"ETA {format_duration(speed.seconds_left)}" if speed else "",
        ]
        lines[step.key] = f"{step.key}: {', '.join(filter(None, fields))}"
    return lines | {warning: f"warning: {warning}" for warning in status.warnings}


def _units(step: StepStatus) -> tuple[int, int]:
    """Return the done and the total amount of a step: shards, optimizer steps, or the one result of an evaluation."""
    if step.training:
        total = int(step.training["num_steps"])
        return (total if step.is_done else int(step.training["step"])), total
    if step.num_shards:
        return len(step.shards), step.num_shards
    return int(step.is_done), 0 if isinstance(stage_spec(step.stage), ShardedStage) else 1
