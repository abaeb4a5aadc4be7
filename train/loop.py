"""Training loop in plain PyTorch, the same for one process and for many.

A job is a pure function of its settings, its files and its seed: the order of blocks and the random numbers of each
step are computed from the step's number, so a run that was interrupted and continues from its newest checkpoint ends with
the weights of an undisturbed one, and losses and gradients are those of the whole step, however many workers share it.
"""

import logging
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from stages.models.config import empty_model, load_model, load_tokenizer, num_positions
from stages.models.devices import attention_choices, attention_in_use, resolve_device, set_threads
from stages.models.heads import check_head
from stages.models.tokenizer import SegmentTokenizer
from train.checkpoints.checkpoint import Checkpoints, TrainState
from train.checkpoints.disks import ONE_DISK, Disk, compare_disks
from train.checkpoints.folders import remove_checkpoints
from train.checkpoints.mirror import CheckpointMirror
from train.data.blocks import FusedBlocks, columns_read
from train.data.feed import Feed
from train.data.files import merged, survey
from train.data.schedule import Schedule
from train.distributed import Workers, environment_size, join_workers
from train.job import MANIFEST, StepRecord, TrainJob, TrainResult
from train.model.card import model_card
from train.model.export import export_model, read_manifest, write_manifest
from train.model.isolation import check_isolation, wants_one_row
from train.model.lora import add_adapters, merge_adapters
from train.model.parallel import LossModel, fill_parameters, full_state, shard_model
from train.model.publish import publish_model
from train.model.rounding import RoundingSurvival, rounding_survival
from train.optimizer import build_optimizer
from train.preemption import Notice, StoppedError, Watch, termination_watch
from train.run_log import RunLog, check_wandb, start_wandb
from train.step import Stepper

logger = logging.getLogger(__name__)

OnStep = Callable[[StepRecord], None]

FETCHED = "fused"
"""Folder, in the output folder, of row groups fetched from an object store; removed when the model is finished."""
_NOT_IN_MANIFEST = ("model_folder", "was_done")  # a run directory can be moved


def train(
    job: TrainJob, *, on_step: OnStep | None = None, watch: Watch | None = None, marker: str | None = None
) -> TrainResult:
    """Train the target model, or resume an interrupted run of the same job.

    Every worker calls this with the same job. It runs under an existing process group, under one that the environment
    describes (``torchrun``), or as a single worker.

    Args:
        job: settings, model and files of the run.
        on_step: called after each optimizer step, when its checkpoint (if one was due) has begun.
        watch: reports that the machine is about to disappear. None: SIGTERM to this process says so.
        marker: name of a file that the process which started the workers has made in its output folder.

    Raises:
        ValueError: the settings, the files or the contents of the output folder do not fit, or the workers neither share a
            disk nor have an object store; says what to do.
        FloatingPointError: a loss or a gradient is not finite; names the blocks.
        StoppedError: the job was told to stop; its checkpoint is written.
    """
    # 1. Refuse or return before anything expensive: no model is loaded.
    output = check_job(job, num_workers=environment_size())
    if environment_size() == 1 and (done := finished(job)) is not None:  # before the device is used
        return _published(job, done)
    device = resolve_device(job.config.device)
    set_threads(device, job.config.cpus_per_worker)
    with ExitStack() as stack:
        watch = watch or stack.enter_context(termination_watch())
        workers = stack.enter_context(join_workers(device))
        # If each machine has its own disk, checkpoints are complete only in an object store: refuse a job without one.
        disk = compare_disks(output, workers, store=job.checkpoint_store, marker=marker)
        with workers.fail_together():
            done = _published(job, trained) if workers.is_first and (trained := finished(job)) is not None else None
        done = workers.broadcast(done)  # other machines may have nothing in their folders
        if done is not None:
            return done
        # 2. Load data and model, in this order: blocks that do not fit are found before the model is read.
        blocks, num_ids = _open_blocks(job, workers)
        root = _load(job, workers, blocks, num_ids=num_ids)
        # 3. Train, from the newest checkpoint on, and export.
        last = take_steps(job, root, blocks, workers, on_step, watch, disk=disk)
        return _finish(job, output, root, last, workers, disk)


def take_steps(
    job: TrainJob,
    root: LossModel,
    blocks: FusedBlocks,
    workers: Workers,
    on_step: OnStep | None,
    watch: Watch,
    *,
    disk: Disk = ONE_DISK,
) -> StepRecord:
    """Take the remaining steps, from the newest committed checkpoint in the job's output folder on.

    Args:
        job: settings of the run; its model is not loaded here.
        root: the sharded model, with the values that training begins with.
        blocks: the training blocks.
        workers: processes that share the model; all of them call this.
        on_step: called after each optimizer step, when its checkpoint (if one was due) has begun.
        watch: reports that the machine is about to disappear.
        disk: this worker's view of the output folder: which workers share it.

    Returns:
        The record of the job's last step.

    Raises:
        ValueError: the output folder belongs to another job.
        FloatingPointError: a loss or a gradient is not finite; names the blocks.
        StoppedError: the job was told to stop; its checkpoint is written.
    """
    # 1. Build what does not depend on how far the job is.
    config, output = job.config, Path(job.output)
    optimizer = build_optimizer(root.model, config)
    schedule = Schedule(len(blocks), config.batch_size, config.num_epochs, config.seed)
    flatten = config.isolate_documents and wants_one_row(root.model)
    keep = config.keep_checkpoints
    copies = CheckpointMirror(job.checkpoint_store, keep=keep) if job.checkpoint_store else None
    with ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(output, root.model, optimizer, workers, keep=keep, copies=copies, disk=disk)
        )
        # 2. Restore the newest checkpoint, then open log and feed at its step: the log drops the records after it.
        state = checkpoints.restore(_first_state(job, schedule))
        logger.info(
            "train %s: %d of %d steps done, %s", job.fingerprint, state.step, schedule.num_steps, workers.device
        )
        log = stack.enter_context(RunLog(output, step=state.step, wandb=start_wandb(job))) if workers.is_first else None
        feed = stack.enter_context(
            Feed(blocks, schedule, state.step, workers, config.micro_batch_size, flatten=flatten)
        )
        stepper = Stepper(config, root, optimizer, schedule, workers)
        # Only the first worker has the log, but a job that is at its end returns the last record on every worker.
        last = workers.broadcast(log.last if log else None)
        was_told = False
        # 3. Take the steps.
        while state.step < schedule.num_steps:
            last = stepper.step(feed, tokens_before=state.num_tokens)
            state = _next_state(state, schedule, last.num_tokens)
            if log:
                log.add(last)
                logger.info(
                    "step %d/%d: loss %.4f, %.0f tokens/s", last.step, last.num_steps, last.loss, last.tokens_per_second
                )
            # A notice to any worker counts for all, since saving is collective. SAVE is repeated while the machine is
            # about to go, so only the first one writes a separate checkpoint.
            notice = workers.max_int(watch())
            is_new = notice > Notice.NONE and not was_told
            was_told = was_told or is_new
            is_last = state.step == schedule.num_steps
            if state.step % config.checkpoint_every_steps == 0 or is_last or is_new or notice == Notice.STOP:
                checkpoints.save(state)
            if on_step is not None:
                on_step(last)
            if notice == Notice.STOP and not is_last:
                checkpoints.wait()
                raise StoppedError(_stopped(state.step, schedule.num_steps, checkpoints.safe_step))
    if last is None:
        raise ValueError(
            f"{output}/log.jsonl lost its records although the run is finished: remove {output}, run again"
        )
    return last


def _stopped(step: int, num_steps: int, safe_step: int | None) -> str:
    if safe_step == step:
        return f"stopped as requested after step {step} of {num_steps}, whose checkpoint is written"
    goes_on = "from the beginning" if safe_step is None else f"after step {safe_step}"
    return (
        f"stopped as requested after step {step} of {num_steps}, whose checkpoint could not be copied to the object store: "
        f"training will go on {goes_on}"
    )


def check_job(job: TrainJob, *, num_workers: int) -> Path:
    """Check what can be checked before anything is loaded.

    Args:
        job: settings, model and files of the run.
        num_workers: number of workers that will train it.

    Returns:
        The output folder.

    Raises:
        ValueError: says which setting does not fit, and what to do.
    """
    if "://" in job.output:
        raise ValueError(
            f"train writes its checkpoints and model to a local folder, not to {job.output}: give a local output folder, "
            "and copy the finished model where you want it"
        )
    job.config.check_batch_size(num_workers)
    check_wandb(job.config)
    if job.model.reads_conversations and not job.config.isolate_documents:
        raise ValueError(
            "train.isolate_documents = false lets the conversations of a block see each other, but the models that it "
            "learns from saw each of them alone: set train.isolate_documents = true"
        )
    if not job.files:
        raise ValueError("there are no fused files to train on: run `make fuse` first")
    return Path(job.output)


def finished(job: TrainJob) -> TrainResult | None:
    """Return the result of a job that was finished before; None if there is something left to do.

    Raises:
        ValueError: the output folder holds the finished model of another job.
    """
    output = Path(job.output)
    manifest = read_manifest(output)
    if manifest is None:
        return None
    if manifest["fingerprint"] != job.fingerprint:
        raise ValueError(
            f"{output} holds the finished model of job {manifest['fingerprint']}, this is job {job.fingerprint}: train "
            "in another output folder"
        )
    missing = [name for name in manifest["model_files"] if not (output / "model" / name).is_file()]
    if missing:
        raise ValueError(
            f"{output}/{MANIFEST} says that the job is finished, but {len(missing)} files of its model are missing, "
            f"first {missing[0]}: remove {output}/{MANIFEST} to train again from the newest checkpoint"
        )
    return TrainResult(model_folder=str(output / "model"), was_done=True, **manifest["result"])


def _published(job: TrainJob, result: TrainResult) -> TrainResult:
    """Publish a finished job's model from this machine, if the run is in an object store and does not have it."""
    if result.was_done:
        logger.info("train %s: nothing to do, %s is finished", job.fingerprint, result.model_folder)
    if job.checkpoint_store is not None:
        publish_model(Path(job.output), job.checkpoint_store)
    return result


def _open_blocks(job: TrainJob, workers: Workers) -> tuple[FusedBlocks, int]:
    """Open the training blocks; also return the size of the target's vocabulary."""
    tokenizer = SegmentTokenizer.load(job.model)
    scratch = Path(job.output) / FETCHED
    columns = partial(columns_read, with_distributions=job.config.uses_fusion)
    with workers.fail_together():
        surveyed = survey(job.files, columns, share=(workers.rank, workers.size), scratch=scratch)
    facts = merged(workers.gather(surveyed))
    with workers.fail_together():
        blocks = FusedBlocks(
            job.files,
            prefix_id=tokenizer.prefix_id,
            eos_id=tokenizer.vocabulary.eos_id,
            with_distributions=job.config.uses_fusion,
            isolate_documents=job.config.isolate_documents,
            facts=facts,
            scratch=scratch,
        )
    return blocks, tokenizer.vocabulary.size


def _load(job: TrainJob, workers: Workers, blocks: FusedBlocks, *, num_ids: int) -> LossModel:
    """Load the model with float32 weights, sharded among the workers; the first one reads the files, on its CPU."""
    config = job.config
    loaded = None
    with workers.fail_together():
        if workers.is_first:
            torch.manual_seed(config.seed)  # adapters are initialised at random, and must be the same after a restart
            loaded = load_model(job.model, dtype="float32", attention=("sdpa", "eager"), device="cpu")
            _check_model(job, loaded, blocks, num_ids=num_ids)
            if config.lora is not None:
                loaded = add_adapters(loaded, config.lora)
    # Every worker builds the model on the meta device and shards it, so only one copy of the weights is in memory whole.
    half = config.autocast == "bfloat16"
    model = empty_model(job.model, attention=attention_choices(config.attention, workers.device, half_precision=half))
    if config.lora is not None:
        with torch.device("meta"):
            model = add_adapters(model, config.lora)
    root = shard_model(model, config, workers)
    fill_parameters(root, loaded, workers)
    return root


def _check_model(job: TrainJob, model: Any, blocks: FusedBlocks, *, num_ids: int) -> None:
    """Refuse a model that does not fit the training blocks."""
    num_rows = model.get_input_embeddings().num_embeddings
    # A tokenizer may have tokens that the model has no row for, as long as no text holds one.
    if num_rows < num_ids and (largest := blocks.largest_id()) >= num_rows:
        raise ValueError(
            f"model {job.model.name}: the training blocks hold token {largest}, and the model's embedding has {num_rows} rows: "
            "do tokenizer and weights belong together?"
        )
    longest = blocks.max_tokens
    if num_positions(model, longest) < longest:
        raise ValueError(
            f"model {job.model.name} has {num_positions(model, longest)} positions, and the training blocks are up to "
            f"{longest} tokens long: set fuse.max_length to what the model can read, then run `make fuse`"
        )
    check_head(model)
    if job.config.isolate_documents:
        check_isolation(model)


def _first_state(job: TrainJob, schedule: Schedule) -> TrainState:
    return TrainState(
        fingerprint=job.fingerprint,
        dataset=sha256("\n".join(file.sha256 for file in job.files).encode()).hexdigest(),
        seed=schedule.seed,
        num_blocks=schedule.num_blocks,
        step=0,
        epoch=0,
        next_sample=0,
        num_tokens=0,
    )


def _next_state(state: TrainState, schedule: Schedule, num_tokens: int) -> TrainState:
    step = state.step + 1
    return replace(
        state,
        step=step,
        epoch=schedule.epoch(step),
        next_sample=schedule.samples_before(step),
        num_tokens=num_tokens,
    )


def _finish(
    job: TrainJob, output: Path, root: LossModel, last: StepRecord, workers: Workers, disk: Disk
) -> TrainResult:
    """Export the model, write the manifest, and publish both if the run is in an object store."""
    result = TrainResult(
        model_folder=str(output / "model"),
        fingerprint=job.fingerprint,
        num_steps=last.step,
        num_tokens=last.num_tokens,
        loss=last.loss,
        loss_clm=last.loss_clm,
        loss_fusion=last.loss_fusion,
    )
    weights = full_state(root.model)  # collective: every worker takes part, the first one gets the weights
    with workers.fail_together():
        if workers.is_first:
            model = root.model
            if job.config.lora is not None:
                weights, model = merge_adapters(model, weights), empty_model(job.model, attention=("sdpa", "eager"))
            tokenizer = load_tokenizer(job.model)
            rounding = rounding_survival(job.model, weights)
            card = model_card(job, last, rounding)
            files = export_model(output / "model", model, weights, tokenizer, card, original=job.model)
            # Last: a folder with a manifest is finished, whatever else happens.
            write_manifest(output, _manifest(job, result, files, rounding, attention_in_use(root.model)))
            _published(job, result)
    if disk.is_first:
        shutil.rmtree(output / FETCHED, ignore_errors=True)
        if (
            not disk.is_shared
        ):  # shards of a checkpoint that the store has whole; nobody else tidies this machine's disk
            remove_checkpoints(output)
    logger.info("train %s: finished, %s", job.fingerprint, result.model_folder)
    return result


def _manifest(
    job: TrainJob, result: TrainResult, files: dict[str, str], rounding: RoundingSurvival | None, attention: str
) -> dict[str, Any]:
    return {
        "fingerprint": job.fingerprint,
        "result": {name: value for name, value in asdict(result).items() if name not in _NOT_IN_MANIFEST},
        "settings": job.config.result_settings(),
        "target": job.model.name,
        "sources": list(job.sources),
        "inputs": [asdict(file) for file in job.files],
        "model_files": files,
        "bfloat16": None if rounding is None else asdict(rounding),
        "attention": attention,  # the last workers' choice: "auto" may have chosen differently before a restart
    }
