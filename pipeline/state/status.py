"""State of a run directory, read from storage only (no Ray, no models): what is done, running and failed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pipeline.run.attempts import is_running, unfinished_attempts
from pipeline.run.outcomes import read_result, read_training_log
from pipeline.run.rollup import DoneShard, FiguresReader
from pipeline.run.shard_plan import read_plan
from pipeline.run.stage_table import job_stage
from pipeline.run.steps import ResolvedRun, Step, result_key
from pipeline.run.warnings import shard_warnings
from stages.contract.manifest import HealthMetric
from stages.contract.store import Store
from stages.models.token_tables import FOLDER, TABLE_FILE
from stages.shard.config import QUARANTINED

LOW_COVERAGE = 0.5
"""Share of aligned positions below which status warns: the run would learn almost only from the gold tokens."""

REASONS: Final = {
    "HasTools": "with tool calls",
    "HasMedia": "with images, audio or video",
    "OtherContent": "with content that is not text",
    "UnknownRole": "with an unknown role",
    "NotAConversation": "that are not conversations",
    "CannotRender": "that a chat template refuses",
    "CannotCut": "that are too long",
    "NullText": "that are null",
    "InvalidUtf8": "that are not UTF-8",
    "BadRecordLine": "that cannot be read",
}
"""Why conversations are in quarantine, by the class of the reason, in words."""


@dataclass(frozen=True)
class StepStatus:
    """State of one step.

    Attributes:
        key: the step.
        fingerprint: fingerprint of its folder.
        num_shards: shards in all; 0 while there is no plan, and for train and eval.
        shards: the done shards.
        health: their health metrics, added up; for a job, the figures of its result.
        attempts: shard that is not done -> the recorded attempts at it.
        running: shards that a worker computes now.
        is_done: nothing of the step is left to do.
        training: the last record of the training log; None for the other steps, and before the first step.
    """

    key: str
    fingerprint: str
    num_shards: int = 0
    shards: Mapping[int, DoneShard] = field(default_factory=dict)
    health: Mapping[str, HealthMetric] = field(default_factory=dict)
    attempts: Mapping[int, list[dict[str, Any]]] = field(default_factory=dict)
    running: frozenset[int] = frozenset()
    is_done: bool = False
    training: Mapping[str, Any] | None = None

    @property
    def stage(self) -> str:
        """Stage of the step."""
        return self.key.split("/", maxsplit=1)[0]

    @property
    def failed(self) -> dict[int, str]:
        """Shards that are neither done nor running and had an error -> the last error."""
        last_errors = {}
        for shard, records in self.attempts.items():
            errors = [record["error"] for record in records if record.get("error")]
            if errors and shard not in self.running:
                last_errors[shard] = errors[-1]
        return last_errors

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the done shards."""
        return sum(shard.num_tokens for shard in self.shards.values())

    @property
    def seconds(self) -> float:
        """Seconds of computing of the done shards, all workers together."""
        return sum(shard.seconds for shard in self.shards.values())

    def num_attempts(self, shard: int) -> int:
        """Return the number of attempts at a shard so far; for a done shard, including the successful one."""
        done = self.shards.get(shard)
        return done.attempt if done else len(self.attempts.get(shard, ()))

    @property
    def metrics(self) -> dict[str, HealthMetric]:
        """Health metrics, and for a stage that runs models its speed and the models' share of the time."""
        metrics = dict(self.health)
        seconds, forward = (metrics.get(name) for name in ("stage_seconds", "forward_seconds"))
        if isinstance(seconds, float) and isinstance(forward, float) and seconds:
            metrics["forward_share"] = forward / seconds
            metrics["tokens_per_second_per_worker"] = self.num_tokens / seconds
        return metrics


@dataclass(frozen=True)
class RunStatus:
    """State of a run.

    Attributes:
        url: the run directory.
        name: name of the configuration.
        steps: all of its steps, in order.
        next_command: command to run next; None if everything is done.
        warnings: problems that a user should look at.
        token_tables: keys of the Parquet files that say what token ids stand for, of all configurations.
    """

    url: str
    name: str
    steps: tuple[StepStatus, ...]
    next_command: str | None
    warnings: tuple[str, ...] = field(default=())
    token_tables: tuple[str, ...] = field(default=())


class StatusReader:
    """Reader of a run's state that reads what is done only once, however often it is asked."""

    def __init__(self, resolved: ResolvedRun, store: Store) -> None:
        """Remember the run; nothing is read yet."""
        self._resolved = resolved
        self._store = store
        self._reader = FiguresReader(store)

    def read(self) -> RunStatus:
        """Read the current state of the run."""
        resolved, url = self._resolved, self._store.url
        plan = read_plan(self._store, resolved.steps["shard"].folder)
        num_shards = plan.num_shards if plan else 0
        steps = tuple(self._read_step(step, num_shards) for step in resolved.steps.values())
        unfinished = next((step for step in steps if not step.is_done), None)
        following = None
        if unfinished is not None:
            following = resolved.command(unfinished.stage, url)
            if unfinished.failed:
                following = f"`ptafuse retry {url}`, then {following}"
        warnings = [
            warning
            for step in steps
            if step.stage == "shard" and step.is_done
            for warning in shard_warnings(resolved.config, step.health)
        ]
        tables = tuple(entry.key for entry in self._store.files(FOLDER) if entry.key.endswith(f"/{TABLE_FILE}"))
        return RunStatus(url, resolved.config.name, steps, following, (*warnings, *_warnings(steps)), tables)

    def _read_step(self, step: Step, num_shards: int) -> StepStatus:
        if not step.is_sharded:
            is_done = self._store.exists(result_key(step))
            job = job_stage(step.stage)
            records = read_training_log(step, self._store) if job.keeps_log else []
            training = records[-1] if records else None
            health = job.metrics(read_result(self._store, step) or {}) if is_done and job.metrics else {}
            return StepStatus(step.key, step.fingerprint, health=health, is_done=is_done, training=training)
        done = self._reader.read(step.folder)
        is_done = 0 < num_shards == len(done.shards)
        attempts = {} if is_done else unfinished_attempts(self._store, step.folder, done.shards)
        longest = self._resolved.config.engine.no_progress_timeout_seconds
        running = {shard for shard, past in attempts.items() if is_running(past[-1], longest_seconds=longest)}
        return StepStatus(
            key=step.key,
            fingerprint=step.fingerprint,
            num_shards=num_shards,
            shards=done.shards,
            health=done.health,
            attempts=attempts,
            running=frozenset(running),
            is_done=is_done,
        )


def read_status(resolved: ResolvedRun, store: Store) -> RunStatus:
    """Read the state of a run once."""
    return StatusReader(resolved, store).read()


def _warnings(steps: tuple[StepStatus, ...]) -> list[str]:
    warnings = []
    for step in steps:
        covered, positions = step.health.get("covered"), step.health.get("positions")
        if isinstance(covered, int) and isinstance(positions, int) and covered < LOW_COVERAGE * positions:
            warnings.append(
                f"{step.key}: only {covered / positions:.0%} of the positions have an aligned distribution; training "
                "would learn almost only from the gold tokens. Try align.inexact = 'transport', or another source."
            )
        quarantined = sum(shard.num_quarantined for shard in step.shards.values())
        if quarantined:
            warnings.append(
                f"{step.key}: {quarantined} records are in quarantine{_reasons(step)}; see "
                f"{step.key}/{step.fingerprint}/quarantine"
            )
    return warnings


def _reasons(step: StepStatus) -> str:
    """Return why conversations are in quarantine, the most frequent reason first; nothing for other records."""
    counts = {
        name.removeprefix(QUARANTINED): count
        for name, count in step.metrics.items()
        if name.startswith(QUARANTINED) and isinstance(count, int)
    }
    if not counts:
        return ""
    kinds = sorted(counts, key=lambda kind: (-counts[kind], kind))
    return " (" + ", ".join(f"{counts[kind]} {REASONS.get(kind, kind)}" for kind in kinds) + ")"
