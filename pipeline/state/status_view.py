"""How ``ptafuse status`` is shown: a table for people, JSON for programs."""

from collections.abc import Container
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.state.status import RunStatus, StepStatus
from stages.contract.manifest import Figure, Mean


def status_json(status: RunStatus) -> dict[str, Any]:
    """For ``ptafuse status --json``."""
    return {
        "run": status.url,
        "config": status.name,
        "next_command": status.next_command,
        "warnings": list(status.warnings),
        "steps": [_step_json(step) for step in status.steps],
    }


def print_status(status: RunStatus, console: Console) -> None:
    """Show where a run stands."""
    table = Table(title=f"{status.url}  ({status.name})", title_justify="left")
    for column in ("step", "fingerprint", "done", "failed", "tokens", "attempts", "tokens/s"):
        table.add_column(column, justify="left" if column in ("step", "fingerprint") else "right")
    for step in status.steps:
        tried = sum(map(step.num_attempts, {*step.shards, *step.attempts}))
        table.add_row(
            step.key,
            step.fingerprint,
            f"{len(step.shards)}/{step.num_shards}" if step.num_shards else _yes(step),
            str(len(step.failed) or ""),
            f"{step.num_tokens:,}" if step.num_tokens else "",
            str(tried or ""),
            f"{step.num_tokens / step.seconds:,.0f}" if step.seconds and step.num_tokens else "",
        )
    console.print(table)
    for step in status.steps:
        figures = ", ".join(f"{name} {shown_figure(figure)}" for name, figure in sorted(step.figures.items()))
        if figures:
            console.print(f"{step.key}: {figures}")
        for shard, error in sorted(step.failed.items()):
            console.print(f"{step.key} shard {shard} failed: {error}", style="red")
    for warning in status.warnings:
        console.print(f"warning: {warning}", style="yellow")
    console.print(
        "everything is done" if status.next_command is None else f"next: {status.next_command}", soft_wrap=True
    )


def _step_json(step: StepStatus) -> dict[str, Any]:
    failed = step.failed
    shards = []
    for shard in range(step.num_shards):
        done = step.shards.get(shard)
        shards.append(
            {
                "shard": shard,
                "state": _state(step, shard, failed),
                "attempts": step.num_attempts(shard),
                "sha256": done.sha256 if done else None,
                "data": done.data_key if done else None,
                "num_bytes": done.num_bytes if done else None,
                "num_rows": done.num_rows if done else None,
                "num_quarantined": done.num_quarantined if done else None,
                "num_tokens": done.num_tokens if done else None,
                "seconds": done.seconds if done else None,
                "error": failed.get(shard),
            }
        )
    return {
        "step": step.key,
        "fingerprint": step.fingerprint,
        "is_done": step.is_done,
        "num_shards": step.num_shards,
        "num_done": len(step.shards),
        "health": {name: _health_json(figure) for name, figure in step.figures.items()},
        "shards": shards,
    }


def _state(step: StepStatus, shard: int, failed: Container[int]) -> str:
    if shard in step.shards:
        return "done"
    if shard in step.running:
        return "running"
    if shard in failed:
        return "failed"
    return "unfinished" if shard in step.attempts else "pending"


def _health_json(figure: Figure) -> float | None:
    if isinstance(figure, Mean):
        return figure.value if figure.count else None
    return figure


def shown_figure(figure: Figure) -> str:
    """A health figure for people."""
    if isinstance(figure, Mean):
        return f"{figure.value:.4g}" if figure.count else "-"
    if isinstance(figure, float):
        return f"{figure:,.4g}"
    return f"{figure:,}"


def _yes(step: StepStatus) -> str:
    return "yes" if step.is_done else "no"
