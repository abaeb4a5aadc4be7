"""Benchmarks of the transformers backend: against ``model(...).logits.float().log_softmax(-1).topk()``, and its overhead."""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.run.records import recorded_run
from stages.contract.store import Store
from stages.logits.backends.topk import topk_logprobs
from stages.logits.config import LogitsConfig
from stages.logits.stage import LogitsStage
from stages.models.batches import NO_GOLD
from stages.models.heads import split_head
from tests.benchmarks import align_data
from tests.benchmarks.figure import Figure
from tests.benchmarks.measure import ROUNDS, SkippedError, one_core, say
from tests.benchmarks.memory import extra_peak, is_measurable

VOCABULARIES = {"32k": 32_000, "152k": 151_936}
TOP_K = 10
PEAK_POSITIONS, SPEED_POSITIONS = (4, 2048), (2, 512)
Work = Callable[[], object]


def _ways(vocab_size: int, shape: tuple[int, int]) -> dict[str, Work]:
    """Build both computations on one layer of Llama with a head of real width, in float32, without gradients."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=vocab_size, **settings)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.randint(vocab_size, shape)
    gold_ids = torch.cat([ids[:, 1:], torch.full((len(ids), 1), NO_GOLD)], dim=1).flatten()
    body, head = split_head(model)
    chunk_positions = LogitsConfig().chunk_positions

    @torch.inference_mode()
    def ours() -> object:
        return topk_logprobs(
            body(ids).flatten(0, 1),
            head,
            gold_ids,
            top_k=TOP_K,
            num_valid=vocab_size,
            chunk_positions=chunk_positions,
        )

    @torch.inference_mode()
    def plain() -> object:
        return model(ids, use_cache=False).logits.float().log_softmax(-1).topk(TOP_K)

    return {"ours": ours, "plain": plain}


def peak_memory_vs_plain() -> list[Figure]:
    """Compare the peak of resident memory beyond the weights for 8,192 positions, each in a separate process (VmHWM)."""
    if not is_measurable():
        raise SkippedError("peak memory is read from Linux's /proc")
    figures = []
    for name, vocab_size in VOCABULARIES.items():
        peaks = {way: _peak_in_child(way, vocab_size) for way in ("ours", "plain")}
        say(f"{vocab_size} ids: {peaks['ours'] / 2**20:.0f} MiB against {peaks['plain'] / 2**20:.0f} MiB")
        ratio = peaks["ours"] / peaks["plain"]
        figures.append(Figure(f"logits.peak_memory_vs_plain_{name}", ratio, "of plain's", "<= 0.1"))
    return figures


def _peak_in_child(way: str, vocab_size: int) -> int:
    command = [sys.executable, "-m", "tests.benchmarks.logits", way, str(vocab_size)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _measure_peak(way: str, vocab_size: int) -> None:
    """Print the peak of resident memory during the work, in bytes beyond the memory before."""
    _ways(vocab_size, (1, 8))[way]()  # libraries' own buffers
    print(extra_peak(_ways(vocab_size, PEAK_POSITIONS)[way]))


def speed_vs_plain() -> list[Figure]:
    """Compare the CPU time of both on the same batch of 1,024 positions, in turns on one core."""
    figures = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with one_core():
        for name, vocab_size in VOCABULARIES.items():
            seconds = _in_turns(_ways(vocab_size, SPEED_POSITIONS), ROUNDS + 2)
            say(f"{vocab_size} ids: {seconds['ours'] * 1e3:.0f} ms against {seconds['plain'] * 1e3:.0f} ms")
            ratio = seconds["plain"] / seconds["ours"]
            figures.append(Figure(f"logits.speed_vs_plain_{name}", ratio, "times faster", ">= 1"))
    torch.set_num_threads(threads)
    return figures


def _in_turns(ways: dict[str, Work], rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of each, after a warm-up call."""
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, work in ways.items():
            started = time.process_time()
            work()
            if number:
                taken[way].append(time.process_time() - started)
    return {way: statistics.median(values) for way, values in taken.items()}


def time_outside_forward() -> list[Figure]:
    """Measure the share of a shard's time outside the model's forward pass: SmolLM2 on a shard, from file to file."""
    store = Store(str(align_data.run_folder()))
    run = recorded_run(store)
    shard = store.read_manifest(run.steps["shard"].folder, 0)
    assert shard is not None
    stage = LogitsStage(run.config.logits, run.config.target)
    stage.setup()
    shares = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS + 1):
            with _forward_seconds() as forward:
                started = time.perf_counter()
                output = stage.run({"shard": store.read_table(shard.data, remake="`make demo`")})
                Store(folder).write_table("out.parquet", output.table)
                seconds = time.perf_counter() - started
            if number:
                shares.append(1 - forward[0] / seconds)
                say(f"{output.num_tokens} tokens in {seconds:.2f} s, {forward[0]:.2f} s of them in body and head")
    return [Figure("logits.time_outside_forward", statistics.median(shares), "of the shard's time", "<= 0.1")]


@contextmanager
def _forward_seconds() -> Iterator[list[float]]:
    """Measure wall time inside the outermost torch modules: the body, and the head over a chunk, but not top-k."""
    total, stack = [0.0], []

    def enter(*_: object) -> None:
        stack.append(time.perf_counter())

    def leave(*_: object) -> None:
        started = stack.pop()
        if not stack:
            total[0] += time.perf_counter() - started

    hooks = [
        torch.nn.modules.module.register_module_forward_pre_hook(enter),
        torch.nn.modules.module.register_module_forward_hook(leave),
    ]
    try:
        yield total
    finally:
        for hook in hooks:
            hook.remove()


if __name__ == "__main__":
    _measure_peak(sys.argv[1], int(sys.argv[2]))
