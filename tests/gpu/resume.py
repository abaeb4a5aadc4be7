"""A training run that is killed and goes on: the same weights, bit by bit; and the same losses as on the CPU."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tests.benchmarks.fused_layout import write_files
from tests.gpu.models import UNUSED, llama_config, random_model
from tests.gpu.report import Report, Setup
from train.checkpoints.folders import checkpoint_folder, committed_steps
from train.config import TrainConfig
from train.data.blocks import FusedBlocks
from train.distributed import join_workers
from train.job import FusedFile, StepRecord, TrainJob
from train.loop import take_steps
from train.model.parallel import full_state, shard_model
from train.preemption import Notice

NUM_STEPS, SAVED, KILLED = 6, 3, 4
BATCH_SIZE = 4


class _KilledError(Exception):
    """Ends a run between two steps, with nothing written that was not on disk."""


def run_resume(report: Report, setup: Setup) -> None:
    """Train six steps undisturbed, killed after the fourth and resumed from the third, and on the CPU."""
    size = setup.size
    files = write_files(
        setup.scratch / "resume",
        num_tokens=NUM_STEPS * BATCH_SIZE * size.resume_block_tokens,
        distinct=1,
        blocks_per_file=NUM_STEPS * BATCH_SIZE,
        length=size.resume_block_tokens,
        vocab_size=llama_config(size.resume_model).vocab_size,
    )
    with _deterministic():
        # eager attention is made of products and sums that have one order; SDPA's backward pass need not.
        for attention in ("eager", "sdpa"):
            one = _run(setup, files, attention, f"{attention}-undisturbed")
            with_kill = _killed_and_resumed(setup, files, attention)
            if attention == "eager":
                undisturbed = one
            differing = sum(not torch.equal(one[1][name], with_kill[1][name]) for name in one[1])
            limit = "<= 0" if attention == "eager" else None
            report.add(f"weights_that_differ_{attention}", differing, limit)
            report.add(f"losses_that_differ_{attention}", _num_differing(one[0], with_kill[0]), limit)
    # On the CPU with other micro-batches: on a CPU too, the two sums have different orders.
    on_cpu = _run(setup, files, "eager", "cpu", device="cpu", micro_batch_size=1)
    pairs = list(zip(undisturbed[0], on_cpu[0], strict=True))
    report.add("steps", len(pairs), f">= {NUM_STEPS}")
    worst = max(abs(one.loss - other.loss) / abs(other.loss) for one, other in pairs)
    report.add("loss_difference_from_cpu", worst, "<= 1e-3")
    worst = max(abs(one.grad_norm - other.grad_norm) / other.grad_norm for one, other in pairs)
    report.add("gradient_norm_difference_from_cpu", worst, "<= 1e-3")
    report.add("loss_fall_in_six_steps", pairs[0][0].loss - pairs[-1][0].loss)


def _run(
    setup: Setup,
    files: tuple[FusedFile, ...],
    attention: str,
    name: str,
    *,
    device: str | None = None,
    micro_batch_size: int = 2,
    kill: bool = False,
    seed: int = 0,
) -> tuple[list[StepRecord], dict[str, Tensor]]:
    """Take the steps that are left; return their records, and the weights at the end."""
    device = device or setup.device
    output = setup.scratch / name
    output.mkdir(parents=True, exist_ok=True)
    config = TrainConfig(
        batch_size=BATCH_SIZE,
        micro_batch_size=micro_batch_size,
        learning_rate=1e-3,
        autocast="float32",
        checkpoint_every_steps=SAVED,
        device=device,
    )
    job = TrainJob(config, UNUSED, files, str(output), fingerprint="0123456789ab")
    records: list[StepRecord] = []

    def on_step(record: StepRecord) -> None:
        records.append(record)
        if kill and record.step == KILLED:
            raise _KilledError

    blocks = FusedBlocks(files, prefix_id=None, eos_id=None, with_distributions=True)
    with join_workers(torch.device(device)) as workers:
        shape = llama_config(setup.size.resume_model)
        model = random_model(shape, device="cpu", dtype=torch.float32, attention=attention, seed=seed).to(device)
        root = shard_model(model, config, workers)
        take_steps(job, root, blocks, workers, on_step, lambda: Notice.NONE)
        return records, full_state(root.model)


def _killed_and_resumed(
    setup: Setup, files: tuple[FusedFile, ...], attention: str
) -> tuple[list[StepRecord], dict[str, Tensor]]:
    """Return the records of the steps after the resumption, and the weights at the end."""
    name = f"{attention}-killed"
    try:
        _run(setup, files, attention, name, kill=True)
    except _KilledError:
        pass
    else:
        raise RuntimeError(f"the run was not killed after step {KILLED}")
    output = setup.scratch / name
    if committed_steps(output) != [SAVED]:
        raise RuntimeError(f"committed checkpoints are of steps {committed_steps(output)}, expected [{SAVED}]")
    _tear_checkpoint(output)
    # Other random weights: what the resumed run ends with can only be the checkpoint's.
    return _run(setup, files, attention, name, seed=1)


def _tear_checkpoint(output: Path) -> None:
    """Leave a later checkpoint that a killed process did not finish."""
    torn = checkpoint_folder(output, KILLED)
    shutil.copytree(checkpoint_folder(output, SAVED), torn)
    (torn / "COMMITTED").unlink()


def _num_differing(undisturbed: list[StepRecord], resumed: list[StepRecord]) -> int:
    """Count the resumed steps whose record is another than the undisturbed run's, times and memory left out."""
    left_out = {"tokens_per_second": 0.0, "data_wait_share": 0.0, "peak_memory_gb": 0.0, "mfu": None}
    expected = {record.step: replace(record, **left_out) for record in undisturbed}
    if [record.step for record in resumed] != list(range(SAVED + 1, NUM_STEPS + 1)):
        raise RuntimeError(f"resumed steps are {[record.step for record in resumed]}, expected those after {SAVED}")
    return sum(replace(record, **left_out) != expected[record.step] for record in resumed)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Let torch choose deterministic kernels, and warn where it has none."""
    was_on, only_warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=only_warned)
