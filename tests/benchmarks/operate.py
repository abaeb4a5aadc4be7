"""Benchmark of ``status`` and ``plan`` for a run of 10,000 shards per stage, on local disk and on S3.

The run directory is synthetic: it has a real plan, manifests, attempts and rollups of five sharded steps, but no data.
Whole commands are timed, including the start of Python.
"""

import hashlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pipeline.run.rollup import manifest_entries, read_lines, roll_up, write_rollup
from pipeline.run.steps import ResolvedRun
from stages.contract.store import Store
from tests.benchmarks.figure import Figure
from tests.benchmarks.measure import say
from tests.synthetic_run import SHARDED, fill, synthetic_run
from tests.tiny_run import REPOSITORY, save_inputs

NUM_SHARDS = 10_000
ROUNDS = 5
REMOTE_ROUNDS = 3
BUCKET = "ptafuse-bench"
DONE = {**dict.fromkeys(SHARDED[:-1], NUM_SHARDS), SHARDED[-1]: NUM_SHARDS // 2}
"""Number of finished shards per step. The last step is half done, so that its attempts are read too."""

_PROGRAM = """
import re
from pathlib import Path
from pipeline.cli.main import main
try:
    main()
finally:
    print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""
"""Program that runs a ptafuse command and prints its peak memory in kB as the last line. (``ru_maxrss`` of a child process
starts at its parent's value.)"""


def status_and_plan() -> list[Figure]:
    """Measure seconds and memory of status and plan with 10,000 shards in each of five steps."""
    with tempfile.TemporaryDirectory() as folder:
        config = save_inputs(Path(folder))
        store = Store(str(Path(folder) / "run"))
        run = synthetic_run(config, store, NUM_SHARDS)
        fill(run, Path(store.url), DONE)
        cold = _timed("status", run, store.url)
        for key in SHARDED:
            roll_up(store, run.steps[key].folder)
        figures = _figures(run, store.url, ROUNDS, "")
        say(f"status without any rollup {cold[0]:.2f} s, {cold[1]:.0f} MiB")
        _sign_for_s3(run, store)
        with _s3_server(Path(store.url)):
            figures += _figures(run, f"s3://{BUCKET}/run", REMOTE_ROUNDS, "_s3")
    return figures


def _figures(run: ResolvedRun, url: str, rounds: int, suffix: str) -> list[Figure]:
    goal = "<= 20" if suffix else "<= 5"
    found = []
    for command in ("status", "plan"):
        before = _children_cpu_seconds()
        measured = [_timed(command, run, url) for _ in range(rounds + 1)][1:]
        cpu = (_children_cpu_seconds() - before) / (rounds + 1)
        seconds = statistics.median(seconds for seconds, _ in measured)
        memory = max(memory for _, memory in measured)
        say(f"{command} {url}: {seconds:.2f} s, of which {cpu:.2f} s are CPU time of the command; {memory:.0f} MiB")
        found.append(_figure(f"{command}_seconds_10k{suffix}", seconds, "s", goal))
        found.append(_figure(f"{command}_memory_mib_10k{suffix}", memory, "MiB", "<= 500"))
    return found


def _children_cpu_seconds() -> float:
    """Return the CPU time of all child processes that have ended; a server that still runs does not count."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _figure(name: str, value: float, unit: str, goal: str) -> Figure:
    return Figure(f"operate.{name}", value, unit, goal, "python -m tests.benchmarks operate")


def _timed(command: str, run: ResolvedRun, url: str) -> tuple[float, float]:
    """Run one command; return its seconds from start to end of the process, and its peak memory in MiB."""
    sets = [part for override in run.request.overrides for part in ("--set", override)]
    arguments = {"status": [url], "plan": [run.request.config_path, "--run", url, *sets]}
    program = [sys.executable, "-c", _PROGRAM, command, *arguments[command]]
    wide = {**os.environ, "COLUMNS": "200"}
    started = time.perf_counter()
    done = subprocess.run(program, check=True, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, env=wide)
    seconds = time.perf_counter() - started
    assert f"{NUM_SHARDS // 2}/{NUM_SHARDS}" in done.stdout.replace(",", "")
    return seconds, int(done.stdout.splitlines()[-1]) / 1024


def _sign_for_s3(run: ResolvedRun, store: Store) -> None:
    """Rewrite the rollups with the ETags that S3 will give the manifests, which are their MD5 hashes."""
    for key in SHARDED:
        folder = run.steps[key].folder
        entries = manifest_entries(store, folder)
        lines = read_lines(store, list(entries.values()))
        etags = {name: f'"{hashlib.md5(store.read(name)).hexdigest()}"' for name in lines}
        shutil.rmtree(store.path(f"{folder}/rollups"))
        write_rollup(store, folder, {name: replace(line, version=etags[name]) for name, line in lines.items()})


@contextmanager
def _s3_server(folder: Path) -> Iterator[None]:
    """Serve the run directory as a bucket by moto in a separate process, with the environment pointing to it."""
    program = [sys.executable, "-m", "tests.benchmarks.s3_server", str(folder), BUCKET]
    with subprocess.Popen(program, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        before = dict(os.environ)
        try:
            os.environ |= {
                "AWS_ENDPOINT_URL": server.stdout.readline().strip(),
                "AWS_ACCESS_KEY_ID": "bench",
                "AWS_SECRET_ACCESS_KEY": "bench",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
                "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            }
            yield
        finally:
            server.kill()
            os.environ.clear()
            os.environ.update(before)
