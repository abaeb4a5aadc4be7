"""Output of ``ptafuse status``: a table for people, JSON for programs."""

from collections.abc import Container
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from pipeline.state.status import RunStatus, StepStatus
from stages.contract.manifest import HealthMetric, Mean
from stages.shard.config import CONTROL_TOKEN_DOCUMENTS, QUARANTINED, UNLEARNT_CONVERSATIONS

GOLD_EXCLUDED: Final = "gold_excluded"
HEADLINES: Final[dict[str, dict[str, str]]] = {
    "shard": {
        "documents": "documents that became segments",
        "empty_documents": "empty, or only whitespace",
        UNLEARNT_CONVERSATIONS: "nothing in them is learned",
        QUARANTINED: "conversations in quarantine, by reason",
        CONTROL_TOKEN_DOCUMENTS: "hold control tokens as text",
        "train_segments": "segments to learn from",
        "validation_segments": "segments held out",
        "test_segments": "segments of the second held-out split",
    },
    "logits": {
        "bits_per_byte": "of the model, on training text",
        "topk_mass": "probability of the kept entries",
        "windowed_segments": "longer than the model's window",
        "tokens_per_second_per_worker": "speed",
    },
    "align": {
        "covered": "positions that got a distribution",
        "completed_nll": "surprise of the gold token, nats",
        GOLD_EXCLUDED: "rows that exclude the gold token",
        "target_exact_nll": "surprise of the target itself, nats",
        "mass_moved": "probability moved to other texts",
        "missing_source_segments": "segments without its logits",
        "unconverged": "transport without convergence",
    },
    "fit": {
        "weight/": "its share of the mixture",
        "nll/mixture": "surprise of the gold token, nats",
    },
    "fuse": {
        "fused": "positions that got a distribution",
        "completed_nll": "surprise of the gold token, nats",
        GOLD_EXCLUDED: "rows that exclude the gold token",
        "target_exact_nll": "surprise of the target itself, nats",
        "block_fill": "filled share of the blocks",
        "missing_source_segments": "segments without a source",
    },
}
"""Stage -> its important health metrics, and what each is; a name that ends in a slash is a prefix of several. All others
are shown by ``status --all``."""
ONLY_IF_ANY: Final = frozenset(
    {
        *("empty_documents", UNLEARNT_CONVERSATIONS, CONTROL_TOKEN_DOCUMENTS, "windowed_segments"),
        *("missing_source_segments", "unconverged", GOLD_EXCLUDED),
    }
)
"""Counts of unusual events, which are not shown while they are 0."""
WHOLES: Final = {
    "covered": "positions",
    "fused": "positions",
    GOLD_EXCLUDED: "positions",
    CONTROL_TOKEN_DOCUMENTS: "documents",
}
"""Count -> the count that it is a share of."""


def status_json(status: RunStatus) -> dict[str, Any]:
    """Build the output of ``ptafuse status --json``."""
    return {
        "run": status.url,
        "config": status.name,
        "next_command": status.next_command,
        "warnings": list(status.warnings),
        "steps": [_step_json(step) for step in status.steps],
        "token_tables": list(status.token_tables),
    }


def print_status(status: RunStatus, console: Console, *, all_metrics: bool = False) -> None:
    """Show the state of a run.

    Args:
        status: status of the run.
        console: console to print on.
        all_metrics: show every health metric, not only the important ones.
    """
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
    _print_health(status, console, all_metrics=all_metrics)
    if status.token_tables:
        console.print(f"meanings of token ids: {', '.join(status.token_tables)}", soft_wrap=True)
    for step in status.steps:
        for shard, error in sorted(step.failed.items()):
            console.print(f"{step.key} shard {shard} failed: {error}", style="red")
    for warning in status.warnings:
        console.print(f"warning: {warning}", style="yellow")
    console.print(
        "everything is done" if status.next_command is None else f"next: {status.next_command}", soft_wrap=True
    )


def _print_health(status: RunStatus, console: Console, *, all_metrics: bool) -> None:
    table = Table(title="health", title_justify="left")
    for column in ("step", "metric", "value", "what it is"):
        table.add_column(column, justify="right" if column == "value" else "left")
    num_left_out = 0
    for step in status.steps:
        meanings = _meanings(step)
        first = True
        for name in (*meanings, *sorted(set(step.metrics) - set(meanings))):
            metric = step.metrics[name]
            if not all_metrics and (name not in meanings or (name in ONLY_IF_ANY and not metric)):
                num_left_out += 1
                continue
            table.add_row(step.key if first else "", name, _with_share(name, metric, step), meanings.get(name, ""))
            first = False
    if table.row_count:
        console.print(table)
    if num_left_out:
        console.print(f"{num_left_out} more metrics: ptafuse status {status.url} --all", soft_wrap=True)


def _meanings(step: StepStatus) -> dict[str, str]:
    """Return the step's important metrics, in the order in which they are shown, and what each is."""
    meanings: dict[str, str] = {}
    for name, meaning in HEADLINES.get(step.stage, {}).items():
        names = [name] if name in step.metrics else []
        if name.endswith("/"):
            names = sorted(metric for metric in step.metrics if metric.startswith(name))
        meanings |= dict.fromkeys(names, meaning)
    return meanings


def _with_share(name: str, metric: HealthMetric, step: StepStatus) -> str:
    if name == "completed_nll" and step.metrics.get(GOLD_EXCLUDED):
        return f"inf ({shown_metric(metric)} elsewhere)"
    whole = step.metrics.get(WHOLES.get(name, ""))
    if isinstance(metric, int) and isinstance(whole, int) and whole:
        return f"{shown_metric(metric)} ({metric / whole:.0%})"
    return shown_metric(metric)


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
        "health": {name: _health_json(metric) for name, metric in step.metrics.items()},
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


def _health_json(metric: HealthMetric) -> float | None:
    if isinstance(metric, Mean):
        return metric.value if metric.count else None
    return metric


def shown_metric(metric: HealthMetric) -> str:
    """Format a health metric for people."""
    if isinstance(metric, Mean):
        return f"{metric.value:.4g}" if metric.count else "-"
    if isinstance(metric, float):
        return f"{metric:,.0f}" if abs(metric) >= 1000 else f"{metric:.4g}"
    return f"{metric:,}"


def _yes(step: StepStatus) -> str:
    return "yes" if step.is_done else "no"
