"""Run one sharded stage: find the pending shards, hand them to a runner, and report the outcome."""

import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

from pipeline.dataset.documents import check_dataset
from pipeline.dataset.files import reading
from pipeline.engine import local_runner
from pipeline.engine.progress import StepProgress
from pipeline.engine.versions import check_library_versions
from pipeline.engine.worker import ShardJob, ShardStatus
from pipeline.run.rollup import SHARDS_PER_ROLLUP, FiguresReader, roll_up
from pipeline.run.session import Run, StageError, command, pending_shards, require_complete
from pipeline.run.shard_plan import freeze_plan, read_plan
from pipeline.run.sharing import import_plan, import_shards, shared_store
from pipeline.run.specs import Resources
from pipeline.run.stage_table import job_stage, sharded_stage
from pipeline.run.steps import Step, result_key
from pipeline.run.warnings import expected_warnings, shard_warnings
from pipeline.settings.adapt import fold_of
from pipeline.settings.run import EngineConfig
from stages.models.token_tables import TokenTables

log = logging.getLogger(__name__)

Runner = Callable[[ShardJob, Sequence[int], Resources, EngineConfig], Iterator[ShardStatus]]


def run_stage(run: Run, stage: str) -> None:
    """Compute every pending shard of a sharded stage.

    Raises:
        StageError: an input stage is incomplete, or shards failed.
        ValueError: the dataset lacks its text column, or is of no known format.
    """
    spec = sharded_stage(stage)
    if spec.reads_documents and read_plan(run.store, run.resolved.steps["shard"].folder) is None:
        other = shared_store(run.config)
        if other is None or not import_plan(run.resolved.steps["shard"], run.store, other):
            dataset = run.config.dataset
            for documents in (dataset, *run.config.eval.texts):
                reading(documents, check_dataset, documents)
            reading(dataset, freeze_plan, run.resolved, run.store)
    if spec.reads_documents:
        _warn_of_few_documents(run)
    for step in run.resolved.of_stage(stage):
        _run_step(run, step)
        if spec.reads_documents:
            for warning in shard_warnings(run.config, FiguresReader(run.store).read(step.folder).health):
                log.warning("%s", warning)


def _warn_of_few_documents(run: Run) -> None:
    """Warn of what the frozen plan shows, until finished shards give more exact warnings."""
    step = run.resolved.steps["shard"]
    plan = read_plan(run.store, step.folder)
    if plan is not None and pending_shards(run.store, step, plan.num_shards):
        for warning in expected_warnings(run.config, sum(shard.num_documents for shard in plan.ranges)):
            log.warning("%s", warning)


def _run_step(run: Run, step: Step) -> None:
    spec = sharded_stage(step.stage)
    num_shards = require_complete(run, list(step.inputs.values()), step.key)
    pending = _without_shared(run, step, pending_shards(run.store, step, num_shards), num_shards)
    if not pending:
        run.console.print(f"{step.key}: nothing to do ({num_shards} of {num_shards} shards are done)")
        return
    _check_tokenizers(run, step)
    check_library_versions(run, step)
    resources = spec.resources(run.config, step.model)
    inputs = {name: run.resolved.steps[key] for name, key in step.inputs.items()}
    jobs = {name: given for name, given in inputs.items() if not given.is_sharded}
    job = ShardJob(
        run_url=run.store.url if not run.store.is_local else run.store.path("").rstrip("/"),
        config_json=run.config.model_dump_json(by_alias=True),
        step=step,
        input_folders={name: given.folder for name, given in inputs.items() if given.is_sharded},
        result_keys={name: result_key(given) for name, given in jobs.items() if job_stage(given.stage).is_table},
        models={name: given.folder for name, given in jobs.items() if not job_stage(given.stage).is_table},
        shard_folder=run.resolved.steps["shard"].folder,
        num_shards=num_shards,
        launch=f"{int(time.time())}-{uuid.uuid4().hex[:8]}",
        max_attempts=run.config.engine.max_attempts,
        cpus=resources.cpus,
        gpus=resources.gpus,
    )
    if job.models:
        pending.sort(key=lambda shard: (fold_of(shard), shard))  # a worker then switches models only once
    failed: list[ShardStatus] = []
    with StepProgress(run.console, step.key, num_shards, num_shards - len(pending)) as progress:
        for number, status in enumerate(_runner(run)(job, pending, resources, run.config.engine), start=1):
            progress.add(status)
            if status.outcome == "failed":
                failed.append(status)
            if number % SHARDS_PER_ROLLUP == 0:
                roll_up(run.store, step.folder)
    roll_up(run.store, step.folder)
    if spec.reads_documents:
        _prepare_maps(run)
    run.console.print(progress.summary())
    missing = set(pending_shards(run.store, step, num_shards)) - {status.shard for status in failed}
    if missing:
        raise StageError(
            f"{step.key}: manifests of shards {', '.join(map(str, sorted(missing)))} disappeared after they were written. Is "
            f"another process using {run.store.url}? Run {command(run, step.stage)} again"
        )
    if failed:
        raise StageError(
            f"{step.key}: {len(failed)} of {num_shards} shards failed:\n{_failures(failed)}\nFix the cause, then "
            f"`ptafuse retry {run.store.url}` and {command(run, step.stage)} again; the other shards are kept."
        )


def _without_shared(run: Run, step: Step, pending: list[int], num_shards: int) -> list[int]:
    """Return the pending shards that ``logits_from`` does not have either; the others get their manifests here."""
    other = shared_store(run.config)
    if other is None or not sharded_stage(step.stage).can_be_shared or not pending:
        return pending
    imported = import_shards(step, run.store, other, pending, num_shards)
    left = [shard for shard in pending if shard not in imported.shards]
    run.console.print(
        f"{step.key}: {len(imported.shards)} of {len(pending)} shards are read in {other.url}", soft_wrap=True
    )
    if imported.other_rows:
        log.warning(
            "%s: %d shards of %s come from other segments than those here (cut by other library versions), or from "
            "another adapted model: computing them here",
            step.key,
            len(imported.other_rows),
            other.url,
        )
    if left:
        log.info("%s: %d shards are not done in %s: computing them here", step.key, len(left), other.url)
    return left


def _failures(failed: Sequence[ShardStatus]) -> str:
    """Format the failures: one line per cause, with the shards that it struck."""
    causes: dict[str, list[int]] = {}
    for status in sorted(failed, key=lambda status: status.shard):
        causes.setdefault(status.message, []).append(status.shard)
    return "\n".join(f"  shard {', '.join(map(str, shards))}: {cause}" for cause, shards in causes.items())


def _check_tokenizers(run: Run, step: Step) -> None:
    """Refuse a tokenizer without byte offsets before any worker starts.

    A tokenizer that has a token table was loaded before, with the same files and libraries. Any other is loaded here, and its
    table is written.

    Raises:
        ValueError: names the model, and says what to give instead.
    """
    tables = TokenTables(run.store)
    for model in sharded_stage(step.stage).tokenizers(run.config, step.model):
        tables.read(model)


def _prepare_maps(run: Run) -> None:
    """Write the maps between the vocabularies that align reads, while the tokenizers which they are made of are loaded here."""
    from stages.align.stage import AlignStage  # loads a compiler, which a finished run does not need

    tables = TokenTables(run.store)
    for source in run.config.sources:
        AlignStage(run.config.align, run.config.target, source, tables).prepare()


def _runner(run: Run) -> Runner:
    if run.local:
        return local_runner.run_shards
    from pipeline.engine import ray_runner  # Ray takes seconds to import: only where shards are to be computed

    return ray_runner.run_shards
