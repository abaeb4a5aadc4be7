"""The training loop: one process, plain PyTorch.

A job is a pure function of its settings, its files and its seed: the order of blocks and the random numbers of each
step are computed from the step's number, so a run that was interrupted and goes on from its newest checkpoint ends with
the weights of an undisturbed one.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from stages.contract.devices import attention_choices, resolve_device, set_threads
from stages.contract.heads import Body, Head, check_head, split_head
from stages.contract.models import load_model, load_tokenizer, num_positions
from stages.contract.tokens import SegmentTokenizer
from train.card import model_card
from train.checkpoint import (
    TrainState,
    export_model,
    load_newest_checkpoint,
    read_manifest,
    save_checkpoint,
    write_manifest,
)
from train.config import TrainConfig
from train.data import Block, FusedBlocks, collate
from train.job import StepRecord, TrainJob, TrainResult
from train.loss import IGNORED, loss_sums
from train.optimizer import build_optimizer, learning_rate
from train.run_log import RunLog
from train.schedule import Schedule

logger = logging.getLogger(__name__)

OnStep = Callable[[StepRecord], None]

_NOT_IN_MANIFEST = ("model_folder", "was_done")  # a run directory can be moved


@dataclass(frozen=True)
class _Losses:
    """Means over one optimizer step, nats; None where nothing was counted."""

    loss: float
    clm: float | None
    fusion: float | None


def train(job: TrainJob, *, on_step: OnStep | None = None) -> TrainResult:
    """Train the target model, or go on from where an interrupted run of the same job left off.

    Args:
        job: what to do.
        on_step: called after each optimizer step, its checkpoint (if one was due) written.

    Raises:
        ValueError: the settings, the files or what lies in the output folder do not fit; says what to do.
        FloatingPointError: a loss or a gradient is not finite; names the blocks.
    """
    output = check_job(job)
    done = finished(job)
    if done is not None:
        logger.info("train %s: nothing to do, %s is finished", job.fingerprint, done.model_folder)
        return done
    config = job.config
    device = resolve_device(config.device)
    set_threads(device, config.cpus_per_worker)
    output.mkdir(parents=True, exist_ok=True)
    vocabulary = SegmentTokenizer.load(job.model).vocabulary
    blocks = FusedBlocks(job.files, bos_id=vocabulary.bos_id, with_distributions=config.lambda_ < 1)
    model = _load(job, device, blocks, num_ids=vocabulary.size)
    optimizer = build_optimizer(model, config)
    schedule = Schedule(len(blocks), config.batch_size, config.num_epochs, config.seed)
    state = load_newest_checkpoint(output, model, optimizer, expected=_first_state(job, schedule))
    logger.info("train %s: %d of %d steps done, %s", job.fingerprint, state.step, schedule.num_steps, device)
    trainer = _Trainer(config, model, optimizer, blocks, device)
    with RunLog(output, step=state.step) as log:
        for step in range(state.step, schedule.num_steps):
            record, num_tokens = trainer.step(schedule, step, state.num_tokens)
            state = _next_state(state, schedule, num_tokens)
            log.add(record)
            logger.info("step %d/%d: loss %.4f, %.0f tokens/s", *_shown(record))
            if state.step % config.checkpoint_every_steps == 0 and state.step < schedule.num_steps:
                save_checkpoint(output, model, optimizer, state, keep=config.keep_checkpoints)
            if on_step is not None:
                on_step(record)
        last = log.last
    if last is None:
        raise ValueError(
            f"{output}/log.jsonl lost its records though the run is at its end: remove {output}, run again"
        )
    return _finish(job, output, model, last)


def check_job(job: TrainJob) -> Path:
    """Check what can be checked before anything is loaded.

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
    config = job.config
    if config.batch_size % config.micro_batch_size:
        raise ValueError(
            f"micro_batch_size = {config.micro_batch_size} does not divide batch_size = {config.batch_size}: choose a "
            "divisor, so that every step sees exactly batch_size blocks"
        )
    if not job.files:
        raise ValueError("there are no fused files to train on: run `make fuse` first")
    return Path(job.output)


def finished(job: TrainJob) -> TrainResult | None:
    """The result of a job that has been finished before; None when there is something to do.

    Raises:
        ValueError: the output folder holds the finished model of another job.
    """
    output = Path(job.output)
    manifest = read_manifest(output)
    if manifest is None:
        return None
    if manifest["fingerprint"] != job.fingerprint:
        raise ValueError(
            f"{output} holds the finished model of job {manifest['fingerprint']}, this is job {job.fingerprint}: train into "
            "another output folder"
        )
    missing = [name for name in manifest["model_files"] if not (output / "model" / name).is_file()]
    if missing:
        raise ValueError(
            f"{output}/manifest.json says the job is done, but {len(missing)} files of its model are missing, first "
            f"{missing[0]}: remove {output}/manifest.json to train again from the newest checkpoint"
        )
    return TrainResult(model_folder=str(output / "model"), was_done=True, **manifest["result"])


class _Trainer:
    """The model, its optimizer and its data on one device."""

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        optimizer: torch.optim.Optimizer,
        blocks: FusedBlocks,
        device: torch.device,
    ) -> None:
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.blocks = blocks
        self.device = device
        halves: tuple[Body, Head] = split_head(model)
        self.body, self.head = halves

    def step(self, schedule: Schedule, step: int, tokens_before: int) -> tuple[StepRecord, int]:
        """One optimizer step; returns its record and the tokens it trained on."""
        started = time.perf_counter()
        torch.manual_seed(
            self.config.seed * 1_000_003 + step
        )  # dropout, where a model has it, does not depend on restarts
        batch = [self.blocks.block(int(index)) for index in schedule.blocks(step)]
        rate = learning_rate(step, schedule.num_steps, self.config)
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._gradients(batch)
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"step {step + 1}: the gradient's norm is {norm} on blocks {_names(batch)}; the last checkpoint is unharmed"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        num_tokens = sum(len(block.ids) for block in batch)
        record = StepRecord(
            step=step + 1,
            num_steps=schedule.num_steps,
            epoch=schedule.epoch(step),
            loss=losses.loss,
            loss_clm=losses.clm,
            loss_fusion=losses.fusion,
            learning_rate=rate,
            grad_norm=norm,
            num_tokens=tokens_before + num_tokens,
            tokens_per_second=num_tokens / (time.perf_counter() - started),
        )
        return record, num_tokens

    def _gradients(self, batch: Sequence[Block]) -> _Losses:
        """Accumulate the gradient of the whole step, whatever the size of its micro-batches."""
        num_labels = sum(int((block.labels != IGNORED).sum()) for block in batch)
        num_fused = sum(int(block.fused.present.sum()) for block in batch if block.fused is not None)
        clm_factor = self.config.lambda_ / num_labels if num_labels else 0.0
        fusion_factor = (1 - self.config.lambda_) / num_fused if num_fused else 0.0
        clm_total = fusion_total = 0.0
        for start in range(0, len(batch), self.config.micro_batch_size):
            blocks = batch[start : start + self.config.micro_batch_size]
            clm, fusion = self._forward(blocks)
            if not math.isfinite(clm.item() + fusion.item()):
                raise FloatingPointError(
                    f"the loss is not finite (CLM {clm.item()}, fusion {fusion.item()}) on blocks {_names(blocks)}; the last "
                    "checkpoint is unharmed"
                )
            clm_total, fusion_total = clm_total + clm.item(), fusion_total + fusion.item()
            loss = clm_factor * clm + fusion_factor * fusion
            if loss.requires_grad:  # blocks of one token each have nothing to predict
                loss.backward()
        return _Losses(
            loss=clm_factor * clm_total + fusion_factor * fusion_total,
            clm=clm_total / num_labels if num_labels else None,
            fusion=fusion_total / num_fused if num_fused else None,
        )

    def _forward(self, blocks: Sequence[Block]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = collate(blocks)
        targets = None if batch.targets is None else batch.targets.to(self.device)
        half = self.config.autocast == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            hidden = self.body(batch.ids.to(self.device))
            return loss_sums(
                hidden.flatten(0, 1),
                self.head,
                batch.labels.to(self.device).flatten(),
                targets,
                chunk_positions=self.config.chunk_positions,
            )


def _load(job: TrainJob, device: torch.device, blocks: FusedBlocks, *, num_ids: int) -> Any:
    """The model with float32 master weights, ready to train."""
    config = job.config
    half = config.autocast == "bfloat16"
    attention = attention_choices(config.attention, device, half_precision=half)
    torch.manual_seed(config.seed)  # a head that the files lack would be drawn at random: then at least the same one
    model = load_model(job.model, dtype="float32", attention=attention, device=str(device))
    num_rows = model.get_input_embeddings().num_embeddings
    if num_rows < num_ids:
        raise ValueError(
            f"model {job.model.name} has {num_rows} embeddings, its tokenizer {num_ids} ids: they do not belong together"
        )
    longest = blocks.max_tokens
    if num_positions(model, longest) < longest:
        raise ValueError(
            f"model {job.model.name} has {num_positions(model, longest)} positions, and the training blocks are up to "
            f"{longest} tokens long: set fuse.max_length to what the model can read, then run `make fuse`"
        )
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):  # FlashAttention takes half precision alone
        check_head(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


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
    return TrainState(
        fingerprint=state.fingerprint,
        dataset=state.dataset,
        seed=state.seed,
        num_blocks=state.num_blocks,
        step=step,
        epoch=schedule.epoch(step),
        next_sample=schedule.samples_before(step),
        num_tokens=state.num_tokens + num_tokens,
    )


def _finish(job: TrainJob, output: Path, model: Any, last: StepRecord) -> TrainResult:
    """Export the model, then publish the manifest."""
    files = export_model(output / "model", model, load_tokenizer(job.model), model_card(job, last))
    result = TrainResult(
        model_folder=str(output / "model"),
        fingerprint=job.fingerprint,
        num_steps=last.step,
        num_tokens=last.num_tokens,
        loss=last.loss,
        loss_clm=last.loss_clm,
        loss_fusion=last.loss_fusion,
    )
    write_manifest(
        output,
        {
            "fingerprint": job.fingerprint,
            "result": {name: value for name, value in asdict(result).items() if name not in _NOT_IN_MANIFEST},
            "settings": job.config.result_settings(),
            "target": job.model.name,
            "sources": list(job.sources),
            "inputs": [asdict(file) for file in job.files],
            "model_files": files,
        },
    )
    logger.info("train %s: finished, %s", job.fingerprint, result.model_folder)
    return result


def _names(blocks: Sequence[Block]) -> str:
    return ", ".join(block.name for block in blocks)


def _shown(record: StepRecord) -> tuple[int, int, float, float]:
    return record.step, record.num_steps, record.loss, record.tokens_per_second
