"""``ptafuse status --watch``: speeds, both views, and how it ends."""

import io
import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.run.records import recorded_run
from pipeline.run.rollup import DoneShard
from pipeline.run.steps import ResolvedRun
from pipeline.state.status import RunStatus, StatusReader, StepStatus
from pipeline.state.watch import Speed, step_speed, watch
from stages.contract.manifest import attempts_folder, manifest_key
from stages.contract.store import Store
from tests.synthetic_run import SHARDED, fill, manifest_of, synthetic_run
from tests.tiny_run import REPOSITORY, command, environment, ptafuse

NOW = 1_000_000.0
NUM_SHARDS = 6


def step(finished: list[float | None], *, num_shards: int = 10, **changes: object) -> StepStatus:
    done = DoneShard(0, 20, 0, 3000, 1, 20.0, 1.0, 0.0, 1, "", "", None)
    shards = {shard: replace(done, shard=shard, finished=at) for shard, at in enumerate(finished)}
    return replace(StepStatus("align/x", "fp", num_shards, shards), **changes)


def test_speed_is_computed_from_recently_finished_shards() -> None:
    recent = step([NOW - 5000, NOW - 80, NOW - 30, NOW])
    assert step_speed(recent, NOW) == Speed(3 * 3000 / 100, 6 * 100 / 3)


def test_speed_counts_ten_minutes_at_most() -> None:
    assert step_speed(step([NOW - 590]), NOW) == Speed(3000 / 600, 9 * 600)


@pytest.mark.parametrize("finished", [[], [NOW - 700], [None]])
def test_step_that_rests_has_no_speed(finished: list[float | None]) -> None:
    assert step_speed(step(finished), NOW) is None


def test_done_step_has_no_speed() -> None:
    assert step_speed(step([NOW], num_shards=1, is_done=True), NOW) is None


def test_speed_of_training_is_the_last_steps() -> None:
    record = {"step": 10, "num_steps": 40, "num_tokens": 5000, "tokens_per_second": 100.0}
    assert step_speed(StepStatus("train", "fp", training=record), NOW) == Speed(100.0, 150.0)


@pytest.fixture
def half_done(tiny_config: Path, tmp_path: Path) -> tuple[ResolvedRun, Store]:
    store = Store(str(tmp_path / "run"))
    run = synthetic_run(tiny_config, store, NUM_SHARDS)
    fill(run, tmp_path / "run", dict.fromkeys(SHARDED[:3], NUM_SHARDS) | {"align/neox": 2})
    for shard, record in (
        (3, {"host": "elsewhere", "pid": 1, "started": time.time() - 9}),
        (4, {"host": "elsewhere", "pid": 1, "started": time.time() - 9, "error": "ValueError: [/INST] is bad"}),
    ):
        where = attempts_folder(run.steps["align/neox"].folder, shard)
        store.create(f"{where}/1-00000000.json", json.dumps({"attempt": 1, "launch": "x", **record}).encode())
    return run, store


def finish(run: ResolvedRun, store: Store) -> None:
    for key in ("align/neox", "fuse"):
        for shard in range(NUM_SHARDS):
            manifest = manifest_of(run, key, shard, NUM_SHARDS)
            store.create(manifest_key(run.steps[key].folder, shard), manifest.to_bytes())
    store.create(f"{run.steps['train'].folder}/manifest.json", b"{}")
    for name in ("llama", "neox", "fused"):
        store.create(f"{run.steps[f'eval/{name}'].folder}/bits-per-byte.json", b"{}")


@pytest.mark.parametrize("terminal", [True, False])
def test_both_views_show_every_step_and_end_when_all_is_done(
    half_done: tuple[ResolvedRun, Store], terminal: bool
) -> None:
    run, store = half_done
    reader = StatusReader(run, store)
    out = io.StringIO()
    seen: list[RunStatus] = []

    def read() -> RunStatus:
        if len(seen) == 2:
            finish(run, store)
        seen.append(reader.read())
        return seen[-1]

    console = Console(file=out, force_terminal=terminal, markup=False, width=120)
    watch(read, console, interval=0.0)
    assert len(seen) == 3
    assert seen[0].steps[3].running == {3}
    assert seen[0].steps[3].failed == {4: "ValueError: [/INST] is bad"}
    text = out.getvalue()
    assert "everything is done" in text
    if terminal:
        assert "align/neox shard 4 failed: ValueError: [/INST] is bad" in text
        assert "2/6" in text
        assert "eval/fused" in text
    else:
        assert "align/neox: 2/6 shards, 1 running, 1 failed, " in text
        assert "tokens/s, ETA " in text
        assert text.count("logits/llama: 6/6 shards") == 1, "an unchanged step is not said again"
        assert "eval/fused: done" in text


def test_training_is_watched_by_its_steps(half_done: tuple[ResolvedRun, Store]) -> None:
    run, store = half_done
    record = {"step": 10, "num_steps": 40, "num_tokens": 5000, "tokens_per_second": 100.0}
    log = f"{run.steps['train'].folder}/log.jsonl"
    store.create(log, f'{json.dumps({**record, "step": 9})}\n{json.dumps(record)}\n{{"step": 1'.encode())
    seen: list[RunStatus] = []

    def read() -> RunStatus:
        if seen:
            finish(run, store)
        seen.append(StatusReader(run, store).read())
        return seen[-1]

    out = io.StringIO()
    watch(read, Console(file=out, width=120), interval=0.0)
    assert "train: 10/40 steps, 100 tokens/s, ETA 2 min 30 s" in out.getvalue()
    assert "train: 40/40 steps\n" in out.getvalue()


def test_store_that_cannot_be_reached_is_tried_again(
    half_done: tuple[ResolvedRun, Store], caplog: pytest.LogCaptureFixture
) -> None:
    run, store = half_done
    tries: list[int] = []

    def read() -> RunStatus:
        tries.append(1)
        if len(tries) == 2:
            raise ConnectionError("no route to host")
        if len(tries) == 3:
            finish(run, store)
        return StatusReader(run, store).read()

    watch(read, Console(file=io.StringIO()), interval=0.0)
    assert len(tries) == 3
    assert "cannot be read, trying again: no route to host" in caplog.text


def test_store_that_cannot_be_read_at_all_is_an_error() -> None:
    def read() -> RunStatus:
        raise PermissionError("no credentials")

    with pytest.raises(PermissionError, match="no credentials"):
        watch(read, Console(file=io.StringIO()), interval=0.0)


def test_watching_a_finished_run_ends_at_once(half_done: tuple[ResolvedRun, Store]) -> None:
    run, store = half_done
    finish(run, store)
    assert recorded_run(store).steps == run.steps
    assert ptafuse("status", store.url, "--watch").stdout.endswith("everything is done\n")


def test_ctrl_c_ends_it_with_130_and_no_traceback(half_done: tuple[ResolvedRun, Store]) -> None:
    _, store = half_done
    arguments = command("status", store.url, "--watch", "--interval", "60")
    with subprocess.Popen(
        arguments, cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert "shard: 6/6 shards" in process.stdout.readline()
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == ""
