"""Benchmarks of align worker processes: the throughput of two, and the memory of one after many shards."""

import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.contract.manifest import DataFile
from stages.contract.store import Store
from stages.models.devices import peak_resident_bytes
from tests.benchmarks import align_data
from tests.benchmarks.figure import Figure
from tests.benchmarks.measure import ROUNDS, say
from tests.benchmarks.memory import begin_peak

PASSES = 2
SMALL_SHARDS = (10, 1000)


def two_workers_vs_one() -> list[Figure]:
    """Compare shards per second (wall time) of two worker processes with one, each with the same number of shards."""
    align_data.shards()
    ratios = []
    with tempfile.TemporaryDirectory() as folder, _workers(2, folder) as workers:
        for number in range(ROUNDS + 1):
            one = _together(workers[:1])
            two = _together(workers)
            if number:  # the first round fills caches
                ratios.append(2 * one / two)
                say(f"one worker {one:.2f} s, two workers with the same work each {two:.2f} s")
    return [Figure("align.two_workers_vs_one", sorted(ratios)[len(ratios) // 2], "times", ">= 1.8")]


def memory_growth() -> list[Figure]:
    """Measure how a worker's peak memory grows from 10 to 1,000 shards of one segment each."""
    align_data.shards()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.workers", folder, "memory"],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    few, many = map(int, done.stdout.split())
    say(
        f"peak resident memory {few / 2**10:.0f} MB after {SMALL_SHARDS[0]} shards, {many / 2**10:.0f} MB after "
        f"{SMALL_SHARDS[1]}"
    )
    return [Figure("align.memory_growth", 100 * (many / few - 1), "%", "<= 5")]


@contextmanager
def _workers(count: int, folder: str) -> Iterator[list[subprocess.Popen]]:
    command = [sys.executable, "-m", "tests.benchmarks.workers"]
    processes = [
        subprocess.Popen(
            [*command, f"{folder}/{number}", "shards"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for number in range(count)
    ]
    try:
        for process in processes:
            _answer(process)
        yield processes
    finally:
        for process in processes:
            process.communicate("")


def _together(workers: list[subprocess.Popen]) -> float:
    started = time.perf_counter()
    for worker in workers:
        assert worker.stdin is not None  # a pipe
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        _answer(worker)
    return time.perf_counter() - started


def _answer(worker: subprocess.Popen) -> None:
    assert worker.stdout is not None  # a pipe
    if not worker.stdout.readline():
        raise RuntimeError(f"an align worker ended with {worker.wait()}; its error is above")


def _serve(folder: str) -> None:
    """Align all shards once for each line of standard input."""
    from tests.benchmarks.align import align_shard

    stage, store, shards = align_data.stage("paper"), Store(folder), align_data.shards()
    print("ready", flush=True)
    for _ in sys.stdin:
        for number in range(PASSES * len(shards)):
            align_shard(stage, store, number % len(shards), shards[number % len(shards)])
        print("done", flush=True)


def _measure_memory(folder: str) -> None:
    """Print the peak memory after few and after many shards, in kilobytes, without the setup."""
    store = Store(folder)
    inputs: list[tuple[DataFile, ...]] = []
    for tables in align_data.shards():
        target, source = map(align_data.read, tables)
        for row in range(min(target.num_rows, source.num_rows)):
            number = len(inputs)
            inputs.append(
                tuple(
                    store.write_table(f"in-{number}-{name}.parquet", table.slice(row, 1))
                    for name, table in (("target", target), ("source", source))
                )
            )
    stage = align_data.stage("paper")
    stage.run(
        {name: store.read_table(data, remake="") for name, data in zip(("target", "source"), inputs[0], strict=True)}
    )
    gc.collect()
    begin_peak()
    for number in range(max(SMALL_SHARDS)):
        pair = inputs[number % len(inputs)]
        target, source = (store.read_table(data, remake="the benchmark") for data in pair)
        store.write_table("out.parquet", stage.run({"target": target, "source": source}).table)
        if number + 1 in SMALL_SHARDS:
            print(peak_resident_bytes() // 1024, flush=True)


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(exist_ok=True)
    {"shards": _serve, "memory": _measure_memory}[sys.argv[2]](sys.argv[1])
