"""A configuration opened in its run directory, with helpers that steps use to find each other's results."""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
from rich.console import Console

from pipeline.dataset.documents import ShardRange, check_dataset, read_kinds
from pipeline.dataset.files import reading
from pipeline.run.preflight import refuse_unusable_models
from pipeline.run.records import record
from pipeline.run.resolve import resolve
from pipeline.run.shard_plan import read_plan
from pipeline.run.sharing import check_shared
from pipeline.run.stage_table import job_stage, stage_spec
from pipeline.run.steps import Request, ResolvedRun, Step, result_key
from pipeline.settings.load import load_config
from pipeline.settings.run import RunConfig
from stages.contract.manifest import manifest_key
from stages.contract.store import Store
from stages.shard.config import DatasetConfig

log = logging.getLogger(__name__)


class StageError(RuntimeError):
    """A stage cannot run or did not finish; the message says what to run next."""


@dataclass(frozen=True)
class Run:
    """A resolved configuration and the run directory it works in."""

    resolved: ResolvedRun
    store: Store
    console: Console
    local: bool
    strict: bool = False

    @property
    def config(self) -> RunConfig:
        """Configuration of the run."""
        return self.resolved.config


def open_run(request: Request, run_url: str, console: Console, *, local: bool, strict: bool = False) -> Run:
    """Check a configuration's files, name its results, and record it in the run directory.

    Args:
        request: the configuration as the user asked for it.
        run_url: the run directory, a local path or an fsspec URL.
        console: console for progress.
        local: compute in this process, without Ray.
        strict: refuse to continue with other library versions than finished shards were computed with.

    Raises:
        ConfigError: a file, key or value of the configuration is wrong.
        PreflightError: a model cannot be used; names every problem of all of them.
        FileNotFoundError: a dataset is missing.
    """
    config = load_config(request.config_path, request.overrides)
    refuse_unusable_models(config)
    for text in config.eval.texts:
        if (
            text.path is not None
        ):  # data sets on the hub are checked when shards are planned: later stages may have no network
            reading(text, check_dataset, text)
    _warn_of_branches(config)
    if config.logits_from is not None:
        check_shared(config.logits_from)
    store = Store(run_url)
    store.check()
    resolved = resolve(config, store, request)
    record(resolved, store)
    return Run(resolved, store, console, local, strict)


def pending_shards(store: Store, step: Step, num_shards: int) -> list[int]:
    """List the shards without a manifest."""
    names = set(store.manifest_names(step.folder))
    return [shard for shard in range(num_shards) if manifest_key("", shard).rsplit("/", 1)[-1] not in names]


def require_complete(run: Run, keys: Sequence[str], name: str) -> int:
    """Refuse to continue while an input step is incomplete.

    Args:
        run: the run.
        keys: steps that must be complete.
        name: name of what needs them, for the message.

    Returns:
        The number of shards.
    """
    plan = read_plan(run.store, run.resolved.steps["shard"].folder)
    if plan is None:
        raise StageError(f"{name} needs shards, and shard has not run yet: run {command(run, 'shard')}")
    for key in keys:
        step = run.resolved.steps[key]
        if not step.is_sharded:
            if not run.store.exists(result_key(step)):
                raise StageError(
                    f"{name} needs the result of {key}, which has not run yet: run {command(run, step.stage)}"
                )
            continue
        missing = len(pending_shards(run.store, step, plan.num_shards))
        if missing:
            done = plan.num_shards - missing
            raise StageError(
                f"{key} is incomplete ({done} of {plan.num_shards} shards): run {command(run, step.stage)}"
            )
    return plan.num_shards


def read_inputs(run: ResolvedRun, store: Store, step: Step, shard: int) -> dict[str, pa.Table]:
    """Read the inputs of a step for a shard, by input name.

    Raises:
        StageError: an input is not done, or not there any more.
    """
    tables = {}
    for name, key in step.inputs.items():
        given = run.steps[key]
        if not given.is_sharded:
            if job_stage(given.stage).is_table:
                tables[name] = result_rows(store.read(result_key(given)))
            continue
        manifest = store.read_manifest(run.steps[key].folder, shard)
        if manifest is None:
            raise StageError(
                f"{key} shard {shard}, which {step.key} is computed from, is missing: run "
                f"{run.command(run.steps[key].stage, store.url)}"
            )
        tables[name] = store.read_table(manifest.data, remake=f"`make {run.steps[key].stage}`")
    if stage_spec(step.stage).reads_kinds(run.config):
        plan = read_plan(store, run.steps["shard"].folder)
        assert plan is not None
        tables["kinds"] = kinds_table(run.config.dataset, plan.ranges[shard])
    return tables


def result_rows(raw: bytes) -> pa.Table:
    """Return what a stage reads of a job's result: its ``rows``."""
    return pa.Table.from_pylist(json.loads(raw)["rows"])


def kinds_table(dataset: DatasetConfig, shard_range: ShardRange) -> pa.Table:
    """Return the kind of each document of a shard: ``doc_id``, and ``kind``, null where the dataset has none."""
    kinds = read_kinds(dataset, shard_range)
    return pa.table({"doc_id": pa.array(kinds.keys(), pa.int64()), "kind": pa.array(kinds.values(), pa.string())})


def command(run: Run, stage: str) -> str:
    """Return the command that runs a stage of this run, as the user would type it."""
    return run.resolved.command(stage, run.store.url)


def _warn_of_branches(config: RunConfig) -> None:
    """Warn of revisions that are not commits: a branch may move, and a fingerprint of its name would not notice."""
    places = {model.name: model.revision for model in config.models} | {"dataset": config.dataset.revision}
    places |= {text.section: text.revision for text in config.eval.texts}
    for name, revision in places.items():
        if revision is not None and not re.fullmatch(r"[0-9a-f]{40}", revision):
            log.warning(
                "%s: revision %r is a branch or tag, not a commit: if it moves on the hub, stale results are reused. "
                "Pin a commit hash",
                name,
                revision,
            )
