"""Benchmarks of training: the loss against dense targets, and the cost of fusion per step."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from stages.contract.store import Store
from stages.contract.threads import USER_VARIABLES
from stages.models.config import ModelConfig, empty_model, load_model
from stages.models.tokenizer import SegmentTokenizer
from tests.benchmarks import align_data, fused_layout
from tests.benchmarks.figure import Figure
from tests.benchmarks.loss_ways import CANDIDATES, H, T
from tests.benchmarks.measure import ROUNDS, SkippedError, say
from train.config import TrainConfig
from train.data.blocks import FusedBlocks
from train.data.feed import Feed
from train.data.schedule import Schedule
from train.distributed import Workers, join_workers
from train.job import FusedFile
from train.model.parallel import LossModel, fill_parameters, shard_model
from train.optimizer import build_optimizer
from train.step import Stepper

VOCABULARIES = {"32k": 32_000, "152k": 151_936}
READER_TOKENS = 50_000_000
READER_BATCH = 32
READER_WARM_STEPS, READER_STEPS = 40, 20
FEW_LARGE_MAPPINGS = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Makes the allocator return freed memory to the system at once, so that resident memory is memory in use."""


def _figure(benchmark: str, name: str, value: float, unit: str, goal: str) -> Figure:
    return Figure(f"train.{name}", value, unit, goal, f"python -m tests.benchmarks train.{benchmark}")


def loss_vs_dense_32k() -> list[Figure]:
    """Compare the loss of 2,048 positions, forward and backward, V = 32,000, with one dense (T, V) target per candidate."""
    return _loss_vs_dense("32k")


def loss_vs_released_32k() -> list[Figure]:
    """Compare the loss with dense targets chosen element by element, as in the released trainers; needs 5 GB."""
    return _loss_vs_dense("32k", "released")


def loss_vs_dense_152k() -> list[Figure]:
    """Compare the loss with dense targets for V = 151,936; dense targets need about 9 GB."""
    return _loss_vs_dense("152k")


def loss_vs_dense_32k_float32() -> list[Figure]:
    """Compare for V = 32,000 without autocast, where three matrix products that both have take most of the time."""
    return _loss_vs_dense("32k", dtype="float32")


def _loss_vs_dense(name: str, other: str = "dense", dtype: str = TrainConfig().autocast) -> list[Figure]:
    size = VOCABULARIES[name]
    ways = ("sparse", other)
    if name == "152k" and _available_bytes() < 12e9:
        raise SkippedError(f"dense targets need 9 GB, and {_available_bytes() / 1e9:.0f} GB of memory are free")
    memory = {way: _measure(way, size, dtype, 0, FEW_LARGE_MAPPINGS)["peak_bytes"] for way in ways}
    seconds = {way: statistics.median(_measure(way, size, dtype, ROUNDS, {})["seconds"]) for way in ways}
    for way in ways:
        say(f"{way}, V = {size:,}: {seconds[way]:.2f} s of CPU time, {memory[way] / 1e6:,.0f} MB of additional memory")
    say(
        f"T = {T:,}, hidden size {H}, head in {dtype}, one thread, {CANDIDATES} candidates; the gradient of the head, "
        f"{torch.empty(0, dtype=getattr(torch, dtype)).element_size() * H * size / 1e6:.0f} MB, is in both"
    )
    is_default = dtype == TrainConfig().autocast
    suffix = f"vs_{other}_{name}" + ("" if is_default else f"_{dtype}")
    benchmark = f"loss_{suffix}"
    limits = ("<= 0.1", "<= 0.5") if other == "dense" and is_default else ("reported", "reported")
    return [
        _figure(
            benchmark,
            f"loss_memory_{suffix}",
            memory["sparse"] / memory[other],
            f"of the {other} way",
            limits[0],
        ),
        _figure(
            benchmark,
            f"loss_time_{suffix}",
            seconds["sparse"] / seconds[other],
            f"of the {other} way",
            limits[1],
        ),
    ]


def _measure(way: str, vocab_size: int, dtype: str, rounds: int, environment: dict[str, str]) -> dict:
    command = [sys.executable, "-m", "tests.benchmarks.loss_ways", way, str(vocab_size), dtype, str(rounds)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    return json.loads(done.stdout)


def _available_bytes() -> int:
    with Path("/proc/meminfo").open() as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def reader_tokens_per_second() -> list[Figure]:
    """Measure how many tokens per CPU second the feed reads and collates, in random order from 50 M tokens of fused files.

    Four files of 1 M tokens are listed repeatedly as if they were different files. So there are as many row groups as in
    50 M tokens, and decoded row groups are cached as in training, but all files are in the page cache. No model is trained.
    The cache of decoded row groups is filled before the measurement. The time of all threads counts, so a machine with a
    free core reads faster.
    """
    with tempfile.TemporaryDirectory(prefix="ptafuse-benchmark-") as folder:
        files = fused_layout.write_files(Path(folder), num_tokens=READER_TOKENS, distinct=4, blocks_per_file=512)
        blocks = FusedBlocks(files, prefix_id=None, eos_id=None, with_distributions=True)
        schedule = Schedule(len(blocks), READER_BATCH, 1, TrainConfig().seed)
        with join_workers(torch.device("cpu")) as workers, Feed(blocks, schedule, 0, workers, 1) as feed:
            for _ in range(READER_WARM_STEPS):
                feed.next()
            speeds = [_feed_speed(feed) for _ in range(ROUNDS)]
    say(
        f"{len(blocks):,} blocks of {fused_layout.LENGTH:,} tokens, {fused_layout.TOP_K} candidates at most per position, in "
        f"{len(files)} files; {ROUNDS} times {READER_STEPS} steps of {READER_BATCH} blocks: "
        f"{min(speeds):,.0f} to {max(speeds):,.0f} tokens per second of CPU time"
    )
    speed = statistics.median(speeds)
    return [_figure("reader_tokens_per_second", "reader_tokens_per_second", speed, "tokens/s of CPU", ">= 400000")]


def _feed_speed(feed: Feed) -> float:
    started = time.process_time()
    num_tokens = sum(feed.next()[0].num_tokens for _ in range(READER_STEPS))
    return num_tokens / (time.process_time() - started)


def step_vs_gold_only() -> list[Figure]:
    """Compare an optimizer step with fusion and one on gold tokens only, on the blocks and the target of a demo run."""
    folder = align_data.run_folder()
    config = json.loads(max(folder.glob("configs/*.json"), key=lambda path: path.stat().st_mtime).read_text())
    target = ModelConfig.model_validate(config["config"]["target"])
    files = _fused_files(config["steps"]["fuse"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with join_workers(torch.device("cpu")) as workers:
            with_fusion, gold_only = _paired_steps(target, files, workers)
    finally:
        torch.set_num_threads(threads)
    ratio = statistics.median(one / other for one, other in zip(with_fusion, gold_only, strict=True))
    say(
        f"{target.name}, {len(with_fusion)} pairs of steps on the same blocks, one thread: with fusion "
        f"{statistics.median(with_fusion):.2f} s of CPU time, gold tokens only {statistics.median(gold_only):.2f} s"
    )
    return [_figure("step_vs_gold_only", "step_vs_gold_only", ratio, "of a step on gold tokens", "<= 1.1")]


def _fused_files(step: dict) -> tuple[FusedFile, ...]:
    store = Store(str(align_data.run_folder()))
    manifests = store.manifests(f"fuse/{step['fingerprint']}")
    return tuple(FusedFile(store.full_url(one.data.key), one.data.sha256) for _, one in sorted(manifests.items()))


def _paired_steps(
    target: ModelConfig, files: tuple[FusedFile, ...], workers: Workers
) -> tuple[list[float], list[float]]:
    """Return CPU seconds of steps with fusion and of steps on the gold tokens of the same blocks, without the first pair."""
    configs = [TrainConfig(**{"lambda": lambda_}, batch_size=1, device="cpu") for lambda_ in (0.8, 1.0)]
    root = _model(target, configs[0], workers)
    optimizer = build_optimizer(root.model, configs[0])
    tokenizer = SegmentTokenizer.load(target)
    seconds: list[list[float]] = [[], []]
    for pair in range(ROUNDS + 1):
        for config, found in zip(configs, seconds, strict=True):
            blocks = FusedBlocks(
                files,
                prefix_id=tokenizer.prefix_id,
                eos_id=tokenizer.vocabulary.eos_id,
                with_distributions=config.uses_fusion,
            )
            schedule = Schedule(len(blocks), 1, 1, config.seed)
            stepper = Stepper(config, root, optimizer, schedule, workers)
            started = time.process_time()  # includes the thread that reads and collates
            with Feed(blocks, schedule, pair, workers, 1) as feed:
                stepper.step(feed, tokens_before=0)
            found.append(time.process_time() - started)
    return seconds[0][1:], seconds[1][1:]


def _model(target: ModelConfig, config: TrainConfig, workers: Workers) -> LossModel:
    loaded = load_model(target, dtype="float32", attention=("sdpa",), device="cpu")
    root = shard_model(empty_model(target, attention=("sdpa",)), config, workers)
    fill_parameters(root, loaded, workers)
    return root


def step_beside_busy_process() -> list[Figure]:
    """Compare the wall time of a training step with two threads on two cores with and without a busy process.

    Three threads that never wait share two cores, so the slower of the two has half a core at worst: twice the time.
    """
    command = [sys.executable, "-m", "tests.benchmarks.busy_step"]
    environment = {
        name: value for name, value in os.environ.items() if name not in (*USER_VARIABLES, "OMP_NUM_THREADS")
    }
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    measured = json.loads(done.stdout)
    alone, beside = (measured[name] for name in ("alone", "beside"))
    say(
        f"median of {len(alone)} turns: alone {statistics.median(alone) * 1e3:,.0f} ms per step, with a busy process "
        f"{statistics.median(beside) * 1e3:,.0f} ms; load {os.getloadavg()[0]:.1f}"
    )
    ratio = statistics.median(two / one for one, two in zip(alone, beside, strict=True))
    return [_figure("step_beside_busy_process", "step_beside_busy_process", ratio, "of a step alone", "<= 2.5")]
