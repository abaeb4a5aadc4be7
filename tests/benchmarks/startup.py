"""Benchmark of starting a step: a whole command on a small run whose shards take a second or two to compute."""

import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from tests.benchmarks.figure import Figure
from tests.benchmarks.measure import SkippedError, say
from tests.tiny_run import REPOSITORY, command, environment

ROUNDS = 3
NUM_SHARDS = 3
DOCUMENTS_PER_SHARD = 20
DATA = REPOSITORY / "demo-data"
CONFIG = "demo"


def step_startup_seconds() -> list[Figure]:
    """Measure ``ptafuse align`` on three shards of the demo, on Ray and in-process, and the time per further step."""
    if not (DATA / "gemma-3-270m" / "tokenizer.json").exists():
        raise SkippedError(f"no {DATA}: run `make demo-data`")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        for stage in ("shard", "logits"):
            _seconds(stage, run, "--local")
        _seconds("align", run, "--local")  # compiles the kernels where no cache holds them yet
        local = _median(run, "align", "--local")
        ray = _median(run, "align")
        several = _median(run, "fuse", "--upstream")  # align, fit, fuse
    say(f"align {ray:.1f} s on Ray, {local:.1f} s in-process; align, fit and fuse in one command {several:.1f} s")
    return [
        Figure("pipeline.step_startup_seconds", ray, "s", "<= 8"),
        Figure("pipeline.step_startup_seconds_local", local, "s", "<= 4"),
        Figure("pipeline.further_step_seconds", (several - ray) / 2, "s per step", "<= 3"),
    ]


def _median(run: Path, stage: str, *options: str) -> float:
    return statistics.median(_seconds(stage, run, *options) for _ in range(ROUNDS))


def _seconds(stage: str, run: Path, *options: str) -> float:
    """Delete a step's results, run it again, and return the seconds from start to end of the process."""
    for made in ("align", "fit", "fuse"):
        shutil.rmtree(run / made, ignore_errors=True)
    size = f"dataset.max_documents={NUM_SHARDS * DOCUMENTS_PER_SHARD}"
    cut = f"shard.documents_per_shard={DOCUMENTS_PER_SHARD}"
    arguments = (stage, CONFIG, "--run", str(run), "--set", size, "--set", cut, *options)
    started = time.perf_counter()
    subprocess.run(command(*arguments), check=True, cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    done = list(run.glob(f"{stage}/**/manifests/shard-*.json"))
    assert len(done) % NUM_SHARDS == 0, done
    assert done, f"{stage} computed nothing"
    return seconds
