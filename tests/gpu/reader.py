"""The reader of training blocks, on files as fuse writes them, in random order: faster than the step needs?"""

import statistics
import time

import torch

from tests.benchmarks.fused_layout import write_files
from tests.gpu.models import llama_config
from tests.gpu.report import Report, Setup
from train.config import TrainConfig
from train.data.blocks import FusedBlocks
from train.data.feed import AHEAD, Feed
from train.data.schedule import Schedule
from train.distributed import join_workers

DISTINCT_FILES = 2


def run_reader(report: Report, setup: Setup) -> None:
    """Time the feed while nothing is trained.

    Two files are written and named again and again as if they were others: row groups are as many, and are kept decoded as
    long, as with so many files, but all of them are in the page cache.
    """
    size = setup.size
    files = write_files(
        setup.scratch / "reader",
        num_tokens=size.reader_tokens,
        distinct=DISTINCT_FILES,
        blocks_per_file=size.reader_blocks_per_file,
        length=size.block_tokens,
        vocab_size=llama_config(size.llama).vocab_size,
    )
    blocks = FusedBlocks(files, prefix_id=None, eos_id=None, with_distributions=True)
    report.add("files", len(files))
    report.add("blocks", len(blocks))
    schedule = Schedule(len(blocks), size.step_blocks, 1, TrainConfig().seed)
    with join_workers(torch.device("cpu")) as workers, Feed(blocks, schedule, 0, workers, 1) as feed:
        for _ in range(AHEAD + 1):  # steps that were read before the time began
            feed.next()
        speeds = []
        for _ in range(size.rounds):
            started = time.perf_counter()
            num_tokens = sum(feed.next()[0].num_tokens for _ in range(size.reader_steps))
            speeds.append(num_tokens / (time.perf_counter() - started))
    speed = statistics.median(speeds)
    report.add_speed("tokens_per_s", speed)
    needed = setup.measured.get("train_tokens_per_s")
    if needed is None:
        report.unavailable("times_the_train_step", "the section train_step measured no speed to compare with")
    else:
        report.add_speed("times_the_train_step", speed / needed, ">= 3")
