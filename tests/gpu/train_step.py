"""Optimizer steps at Llama-2's width on one GPU under FSDP2: speed, and memory against its estimate."""

import statistics
from typing import Any

import torch

from stages.models.devices import attention_choices
from tests.benchmarks.fused_layout import write_files
from tests.gpu.models import llama_config, random_model
from tests.gpu.report import Report, Setup, UnavailableError, free_memory
from train.config import TrainConfig
from train.data.blocks import FusedBlocks
from train.data.feed import Feed
from train.data.schedule import Schedule
from train.distributed import Workers, join_workers
from train.job import StepRecord
from train.model.architecture import architecture
from train.model.estimate import estimate_memory, fits
from train.model.parallel import LossModel, shard_model
from train.optimizer import build_optimizer
from train.step import Stepper

UNCHANGING_RATE = 1e-12
"""Steps at this learning rate leave float32 weights as they are, so that the same blocks give the same loss again."""
TOY_PEAK_TFLOPS = 0.1
MFU_LIMITS = {False: ">= 0.4", True: ">= 0.3"}


def run_train_step(report: Report, setup: Setup) -> None:
    """Measure micro-batches of several sizes, with activations kept and recomputed, on the same blocks."""
    size = setup.size
    model_shape = llama_config({**size.llama, "num_hidden_layers": size.training_layers})
    num_blocks = size.step_blocks * (size.train_steps + 1)
    files = write_files(
        setup.scratch / "train",
        num_tokens=num_blocks * size.block_tokens,
        distinct=1,
        blocks_per_file=num_blocks,
        length=size.block_tokens,
        vocab_size=model_shape.vocab_size,
    )
    blocks = FusedBlocks(files, prefix_id=None, eos_id=None, with_distributions=True)
    device = torch.device(setup.device)
    attention = attention_choices("auto", device, half_precision=True)[0]
    report.add("attention", attention)
    shape = architecture(model_shape, block_tokens=size.block_tokens, half_precision=True, lora=None)
    report.add("parameters", shape.num_parameters)
    losses = []
    with join_workers(device) as workers:
        model = random_model(model_shape, device=setup.device, dtype=torch.float32, attention=attention)
        root = shard_model(model, _config(setup, micro_batch_size=1, recompute=False), workers)
        optimizer = build_optimizer(root.model, _config(setup, micro_batch_size=1, recompute=False))
        for recompute in (False, True):
            _recompute(root.model, recompute=recompute)
            for micro_batch_size in size.micro_batches:
                config = _config(setup, micro_batch_size=micro_batch_size, recompute=recompute)
                name = f"micro_batch_{micro_batch_size}_{'recomputed' if recompute else 'kept'}"
                estimate = estimate_memory(shape, config, block_tokens=size.block_tokens).total
                report.add(f"{name}_estimated_gb", estimate / 1e9)
                if setup.device == "cuda" and not fits(estimate, _gpu_memory_gb()):
                    report.add(name, f"left out: more than this GPU's {_gpu_memory_gb():.0f} GB")
                    continue
                free_memory(setup.device)
                records = _steps(config, root, optimizer, blocks, workers, num_steps=size.train_steps + 1)
                losses.append(records[0].loss)
                _report(report, setup, name, records[1:], estimate, MFU_LIMITS[recompute])
    if not losses:
        raise UnavailableError(f"no micro-batch fits this GPU's {_gpu_memory_gb():.0f} GB")
    spread = (max(losses) - min(losses)) / max(losses)
    report.add("loss_difference_between_ways", spread, "<= 2e-3")


def _config(setup: Setup, *, micro_batch_size: int, recompute: bool) -> TrainConfig:
    return TrainConfig(
        learning_rate=UNCHANGING_RATE,
        batch_size=setup.size.step_blocks,
        micro_batch_size=micro_batch_size,
        gradient_checkpointing=recompute,
        device=setup.device,
        # A CPU's peak is in no table: this one lets the MFU's code run.
        peak_tflops=None if setup.device == "cuda" else TOY_PEAK_TFLOPS,
    )


def _recompute(model: Any, *, recompute: bool) -> None:
    """Switch a sharded model as ``shard_model`` does before it shards one."""
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def _gpu_memory_gb() -> float:
    return torch.cuda.get_device_properties(0).total_memory / 1e9


def _steps(
    config: TrainConfig,
    root: LossModel,
    optimizer: torch.optim.Optimizer,
    blocks: FusedBlocks,
    workers: Workers,
    *,
    num_steps: int,
) -> list[StepRecord]:
    schedule = Schedule(len(blocks), config.batch_size, 1, config.seed)
    stepper = Stepper(config, root, optimizer, schedule, workers)
    with Feed(blocks, schedule, 0, workers, config.micro_batch_size) as feed:
        return [stepper.step(feed, tokens_before=0) for _ in range(num_steps)]


def _report(report: Report, setup: Setup, name: str, records: list[StepRecord], estimate: int, mfu_limit: str) -> None:
    speed = statistics.median(record.tokens_per_second for record in records)
    setup.measured["train_tokens_per_s"] = max(speed, setup.measured.get("train_tokens_per_s", 0.0))
    report.add_speed(f"{name}_tokens_per_s", speed)
    mfus = [record.mfu for record in records if record.mfu is not None]
    report.add_speed(f"{name}_mfu", statistics.median(mfus) if mfus else None, mfu_limit if mfus else None)
    # On a CPU this is the process's, and older than the step.
    peak = max(record.peak_memory_gb for record in records) * 1e9
    report.add_speed(f"{name}_peak_of_estimate", peak / estimate, "0.85 to 1.15")
