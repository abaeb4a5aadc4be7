"""Benchmark of the engine's overhead: scheduling, reading and committing shards that take almost no time to compute."""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from pipeline.engine import local_runner, ray_runner
from pipeline.engine.cluster import start_ray
from pipeline.engine.worker import ShardJob
from pipeline.run.session import Run, open_run
from pipeline.run.shard_plan import freeze_plan
from pipeline.run.specs import Resources
from pipeline.run.steps import Request
from pipeline.settings.run import EngineConfig
from tests.benchmarks.figure import Figure
from tests.tiny_run import save_inputs

NUM_SHARDS = 200
ROUNDS = 5


def overhead_per_shard() -> list[Figure]:
    """Compare Ray Data with the in-process runner: one worker, and shards of one document with one line each."""
    with tempfile.TemporaryDirectory() as folder:
        config = save_inputs(Path(folder))
        corpus = Path(folder) / "corpus.jsonl"
        corpus.write_text('{"text": "one line"}\n' * (NUM_SHARDS * (ROUNDS + 1)))
        start_ray(EngineConfig(num_cpus=2))
        differences = []
        for number in range(ROUNDS + 1):
            seconds = {}
            for name, runner in (("ray", ray_runner), ("local", local_runner)):
                run = _open(config, Path(folder) / f"{name}-{number}")
                pending = range(NUM_SHARDS)
                job = _job(run, NUM_SHARDS)
                started = time.perf_counter()
                outcomes = [
                    status.outcome for status in runner.run_shards(job, pending, Resources(1, 1, 0), run.config.engine)
                ]
                seconds[name] = time.perf_counter() - started
                assert outcomes == ["done"] * NUM_SHARDS
            if number:  # the first round starts Ray's workers and fills the disk cache
                differences.append((seconds["ray"] - seconds["local"]) / NUM_SHARDS * 1000)
                sys.stderr.write(
                    f"  {NUM_SHARDS} shards: Ray {seconds['ray']:.2f} s, in-process {seconds['local']:.2f} s\n"
                )
    return [Figure("pipeline.overhead_per_shard_ms", statistics.median(differences), "ms", "<= 50")]


def _open(config: Path, folder: Path) -> Run:
    overrides = ("shard.documents_per_shard=1", f"dataset.max_documents={NUM_SHARDS}", "shard.max_bad_fraction=1.0")
    console = Console(file=sys.stderr, quiet=True)
    return open_run(Request(str(config), overrides), str(folder), console, local=True)


def _job(run: Run, num_shards: int) -> ShardJob:
    plan = freeze_plan(run.resolved, run.store)
    assert plan.num_shards == num_shards
    step = run.resolved.steps["shard"]
    return ShardJob(
        run_url=run.store.url,
        config_json=run.config.model_dump_json(by_alias=True),
        step=step,
        input_folders={},
        shard_folder=step.folder,
        num_shards=num_shards,
        launch="bench",
        max_attempts=1,
    )
