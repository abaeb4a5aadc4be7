"""What is done, running and failed in a run directory, read from storage alone (no Ray, no models)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.evaluation import result_key
from pipeline.plan import ResolvedRun, Step, read_plan
from pipeline.worker import read_attempts
from stages.contract.manifest import Figure, Manifest, Mean
from stages.contract.store import Store

LOW_COVERAGE = 0.5
"""Share of aligned positions under which status warns: the run would learn from the gold tokens almost alone."""


@dataclass(frozen=True)
class StepStatus:
    """Where one step stands.

    Attributes:
        key: the step.
        fingerprint: of its folder.
        num_shards: shards in all; 0 while there is no plan, and for train and eval.
        manifests: done shards.
        attempts: shard -> the recorded attempts, where there are any.
    """

    key: str
    fingerprint: str
    num_shards: int
    manifests: Mapping[int, Manifest]
    attempts: Mapping[int, list[dict[str, Any]]]
    is_done: bool = False

    @property
    def failed(self) -> dict[int, str]:
        """Unfinished shards with an error -> the last one."""
        found = {}
        for shard, records in self.attempts.items():
            errors = [record["error"] for record in records if record.get("error")]
            if errors and shard not in self.manifests:
                found[shard] = errors[-1]
        return found

    @property
    def num_tokens(self) -> int:
        """Tokens of the done shards."""
        return sum(manifest.num_tokens for manifest in self.manifests.values())

    @property
    def health(self) -> dict[str, Figure]:
        """Health figures of the done shards, added up."""
        total: dict[str, Figure] = {}
        for manifest in self.manifests.values():
            for name, figure in manifest.health.items():
                before = total.get(name)
                if before is None:
                    total[name] = figure
                else:
                    total[name] = before + figure  # type: ignore[operator]  # one name is always of one kind
        return total

    @property
    def figures(self) -> dict[str, Figure]:
        """The health figures, and what follows from the seconds of a stage that runs models: its speed, the models' share."""
        figures = self.health
        seconds, forward = (figures.get(name) for name in ("stage_seconds", "forward_seconds"))
        if isinstance(seconds, float) and isinstance(forward, float) and seconds:
            figures["forward_share"] = forward / seconds
            figures["tokens_per_second_per_worker"] = self.num_tokens / seconds
        return figures


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands."""

    url: str
    name: str
    steps: tuple[StepStatus, ...]
    next_command: str | None
    warnings: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """For ``ptafuse status --json``."""
        return {
            "run": self.url,
            "config": self.name,
            "next_command": self.next_command,
            "warnings": list(self.warnings),
            "steps": [_step_json(step) for step in self.steps],
        }


def read_status(resolved: ResolvedRun, store: Store) -> RunStatus:
    """Read where a run stands."""
    plan = read_plan(store, resolved.steps["shard"].folder)
    num_shards = plan.num_shards if plan else 0
    steps = tuple(_read_step(step, store, num_shards) for step in resolved.steps.values())
    unfinished = next((step for step in steps if not step.is_done), None)
    following = None
    if unfinished is not None:
        following = resolved.command(unfinished.key.split("/", maxsplit=1)[0], store.url)
        if unfinished.failed:
            following = f"`ptafuse retry {store.url}`, then {following}"
    return RunStatus(store.url, resolved.config.name, steps, following, tuple(_warnings(steps)))


def print_status(status: RunStatus, console: Console) -> None:
    """Show where a run stands."""
    table = Table(title=f"{status.url}  ({status.name})", title_justify="left")
    for column in ("step", "fingerprint", "done", "failed", "tokens", "attempts", "tokens/s"):
        table.add_column(column, justify="left" if column in ("step", "fingerprint") else "right")
    for step in status.steps:
        seconds = sum(manifest.seconds for manifest in step.manifests.values())
        done = f"{len(step.manifests)}/{step.num_shards}" if step.num_shards else _yes(step)
        table.add_row(
            step.key,
            step.fingerprint,
            done,
            str(len(step.failed) or ""),
            f"{step.num_tokens:,}" if step.num_tokens else "",
            str(sum(len(records) for records in step.attempts.values()) or ""),
            f"{step.num_tokens / seconds:,.0f}" if seconds and step.num_tokens else "",
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


def _read_step(step: Step, store: Store, num_shards: int) -> StepStatus:
    if step.stage in ("train", "eval"):
        proof = f"{step.folder}/manifest.json" if step.stage == "train" else result_key(step)
        return StepStatus(step.key, step.fingerprint, 0, {}, {}, is_done=store.exists(proof))
    manifests = store.manifests(step.folder)
    tried = [int(name.removeprefix("shard-")) for name in store.names(f"{step.folder}/attempts")]
    attempts = {shard: read_attempts(store, step.folder, shard) for shard in tried}
    is_done = num_shards > 0 and len(manifests) == num_shards
    return StepStatus(step.key, step.fingerprint, num_shards, manifests, attempts, is_done)


def _warnings(steps: tuple[StepStatus, ...]) -> list[str]:
    found = []
    for step in steps:
        covered, positions = step.health.get("covered"), step.health.get("positions")
        if isinstance(covered, int) and isinstance(positions, int) and covered < LOW_COVERAGE * positions:
            found.append(
                f"{step.key}: only {covered / positions:.0%} of the positions have an aligned distribution; training would "
                "learn from the gold tokens almost alone. Try align.inexact = 'transport', or another source."
            )
        quarantined = sum(manifest.num_quarantined for manifest in step.manifests.values())
        if quarantined:
            found.append(
                f"{step.key}: {quarantined} records are in quarantine; see {step.key}/{step.fingerprint}/quarantine"
            )
    return found


def _step_json(step: StepStatus) -> dict[str, Any]:
    shards = []
    for shard in range(step.num_shards):
        manifest = step.manifests.get(shard)
        shards.append(
            {
                "shard": shard,
                "state": _state(step, shard),
                "attempts": len(step.attempts.get(shard, [])),
                "sha256": manifest.data.sha256 if manifest else None,
                "data": manifest.data.key if manifest else None,
                "num_bytes": manifest.data.num_bytes if manifest else None,
                "num_rows": manifest.num_rows_out if manifest else None,
                "num_quarantined": manifest.num_quarantined if manifest else None,
                "num_tokens": manifest.num_tokens if manifest else None,
                "seconds": manifest.seconds if manifest else None,
                "error": step.failed.get(shard),
            }
        )
    return {
        "step": step.key,
        "fingerprint": step.fingerprint,
        "is_done": step.is_done,
        "num_shards": step.num_shards,
        "num_done": len(step.manifests),
        "health": {name: _health_json(figure) for name, figure in step.figures.items()},
        "shards": shards,
    }


def _state(step: StepStatus, shard: int) -> str:
    if shard in step.manifests:
        return "done"
    if shard in step.failed:
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
