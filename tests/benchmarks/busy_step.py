"""Training steps with two threads on two cores, with and without a busy process: ``python -m tests.benchmarks.busy_step``.

This runs in a separate process, because OpenMP reads how its threads wait when it is loaded. It prints one JSON object: the
seconds per step without (``alone``) and with (``beside``) the busy process. The two take turns, so that other load on the
machine affects both equally.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import train  # noqa: F401 - before torch, because it sets how the threads wait

import torch  # isort: skip
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks import fused_layout
from train.config import TrainConfig
from train.data.blocks import FusedBlocks
from train.data.feed import Feed
from train.data.schedule import Schedule
from train.distributed import join_workers
from train.model.parallel import shard_model
from train.optimizer import build_optimizer
from train.step import Stepper

CORES = 2
ROUNDS = 6
STEPS = 3
"""Steps per turn; the median of a turn is recorded."""
LENGTH, VOCABULARY = 256, 8192
MODEL = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}


def main() -> None:
    """Take the steps and print their times."""
    if hasattr(os, "sched_setaffinity"):  # the busy process inherits the cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    torch.set_num_threads(CORES)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    busy.send_signal(signal.SIGSTOP)
    try:
        alone, beside = _measure(busy)
    finally:
        busy.kill()
        busy.wait()
    sys.stdout.write(json.dumps({"alone": alone, "beside": beside}) + "\n")


def _measure(busy: subprocess.Popen) -> tuple[list[float], list[float]]:
    config = TrainConfig(batch_size=1, num_epochs=1, device="cpu")
    num_steps = STEPS * (2 * ROUNDS + 1)
    with (
        tempfile.TemporaryDirectory(prefix="ptafuse-benchmark-") as folder,
        join_workers(torch.device("cpu")) as workers,
    ):
        files = fused_layout.write_files(
            Path(folder),
            num_tokens=LENGTH * num_steps,
            distinct=1,
            blocks_per_file=num_steps,
            length=LENGTH,
            vocab_size=VOCABULARY,
        )
        blocks = FusedBlocks(files, prefix_id=None, eos_id=None, with_distributions=True)
        schedule = Schedule(len(blocks), config.batch_size, config.num_epochs, config.seed)
        root = shard_model(LlamaForCausalLM(LlamaConfig(**MODEL, vocab_size=VOCABULARY)), config, workers)
        stepper = Stepper(config, root, build_optimizer(root.model, config), schedule, workers)
        with Feed(blocks, schedule, 0, workers, config.micro_batch_size) as feed:
            turns = []
            for turn in range(2 * ROUNDS + 1):  # the first turn warms up
                busy.send_signal(signal.SIGCONT if turn and turn % 2 == 0 else signal.SIGSTOP)
                turns.append(statistics.median(_step_seconds(stepper, feed) for _ in range(STEPS)))
    return turns[1::2], turns[2::2]


def _step_seconds(stepper: Stepper, feed: Feed) -> float:
    started = time.perf_counter()
    stepper.step(feed, tokens_before=0)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
