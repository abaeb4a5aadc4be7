"""Frozen plan of a run directory: shard -> its fixed range of documents."""

import json
from dataclasses import dataclass
from typing import Any

from pipeline.dataset.documents import ShardRange, plan_documents
from pipeline.run.steps import ResolvedRun
from stages.contract.digest import sha256
from stages.contract.store import Store


def plan_key(shard_folder: str) -> str:
    """Return ``shard/<fp>/plan.jsonl``."""
    return f"{shard_folder}/plan.jsonl"


def freeze_plan(run: ResolvedRun, store: Store) -> "ShardPlan":
    """Return the plan of a run's shards; the first call makes and freezes it, later calls read it."""
    step = run.steps["shard"]
    plan = read_plan(store, step.folder)
    if plan is not None:
        return plan
    inputs = step.settings["inputs"]
    header = {
        "settings": {key: value for key, value in step.settings.items() if key not in ("inputs", "version")},
        "version": step.settings["version"],
        "dataset": inputs["dataset"],
        "tokenizers": inputs["tokenizers"],
    }
    ranges = plan_documents(run.config.dataset, run.config.shard.documents_per_shard)
    lines = [json.dumps(header, sort_keys=True), *(json.dumps(shard.to_json(), sort_keys=True) for shard in ranges)]
    store.create(plan_key(step.folder), ("\n".join(lines) + "\n").encode())  # another driver's plan is as good as ours
    plan = read_plan(store, step.folder)
    assert plan is not None
    return plan


@dataclass(frozen=True)
class ShardPlan:
    """Frozen plan: shard number -> its fixed range of documents."""

    ranges: tuple[ShardRange, ...]
    sha256: str

    @property
    def num_shards(self) -> int:
        """Number of shards of every sharded stage of the run."""
        return len(self.ranges)


def read_plan(store: Store, shard_folder: str) -> ShardPlan | None:
    """Read the frozen plan; None if the shard stage never ran."""
    try:
        raw = store.read(plan_key(shard_folder))
    except FileNotFoundError:
        return None
    lines = raw.decode().splitlines()[1:]
    return ShardPlan(tuple(ShardRange.from_json(json.loads(line)) for line in lines), sha256(raw))


def plan_header(store: Store, shard_folder: str) -> dict[str, Any] | None:
    try:
        raw = store.read(plan_key(shard_folder))
    except FileNotFoundError:
        return None
    return json.loads(raw.split(b"\n", 1)[0])


def evenly_spread(num_shards: int, wanted: int) -> tuple[int, ...]:
    """Return as many shards as are wanted, or all, at equal distances.

    Args:
        num_shards: number of shards of the run.
        wanted: at least 1.
    """
    count = min(wanted, num_shards)
    return tuple(index * num_shards // count for index in range(count))
