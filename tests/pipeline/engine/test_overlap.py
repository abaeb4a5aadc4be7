"""Two shards at once in one worker."""

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console

from pipeline.engine import local_runner
from pipeline.engine.sharded_stage import run_stage
from pipeline.engine.worker import ShardJob, ShardWorker
from pipeline.run.attempts import Attempt, read_attempts
from pipeline.run.session import open_run
from pipeline.run.shard_plan import read_plan
from pipeline.run.specs import Resources, ShardedStage
from pipeline.run.stage_table import STAGES, stage_spec
from pipeline.run.steps import Request
from pipeline.settings.adapt import FOLDS, fold_of
from pipeline.settings.run import EngineConfig
from stages.contract.digest import sha256
from stages.contract.filesystem import StoreError
from stages.contract.stage import StageOutput
from stages.contract.store import Store
from stages.logits.stage import LogitsStage

KEY = "logits/neox"
PATIENCE_SECONDS = 60
TWO = Resources(1, 1, 0, models=True, shards_per_worker=2)


@pytest.fixture(scope="module")
def job(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardJob:
    """The job of one model's logits, in a run whose shards are cut."""
    run = open_run(Request(str(tiny_config)), str(tmp_path_factory.mktemp("overlap")), Console(quiet=True), local=True)
    run_stage(run, "shard")
    shard = run.resolved.steps["shard"]
    plan = read_plan(run.store, shard.folder)
    assert plan is not None
    return ShardJob(
        run_url=run.store.url,
        config_json=run.config.model_dump_json(by_alias=True),
        step=run.resolved.steps[KEY],
        input_folders={"shard": shard.folder},
        shard_folder=shard.folder,
        num_shards=plan.num_shards,
        launch="one",
        max_attempts=3,
    )


@pytest.fixture
def fresh(job: ShardJob, request: pytest.FixtureRequest) -> ShardJob:
    """Provide the job, with a folder of this test's own for its results."""
    return named(job, request.node.name)


def named(job: ShardJob, name: str) -> ShardJob:
    return dataclasses.replace(job, step=dataclasses.replace(job.step, fingerprint=sha256(name.encode())))


def rows_of(job: ShardJob) -> dict[int, pa.Table]:
    store = Store(job.run_url)
    manifests = store.manifests(job.step.folder)
    return {shard: store.read_table(manifest.data, remake="") for shard, manifest in manifests.items()}


def computed(job: ShardJob, folder: str, resources: Resources) -> tuple[ShardJob, set[int]]:
    job = named(job, f"{job.step.folder}/{folder}")
    statuses = list(local_runner.run_shards(job, range(job.num_shards), resources, EngineConfig()))
    return job, {status.shard for status in statuses if status.outcome == "done"}


def test_only_logits_overlap(tiny_config: Path) -> None:
    overlapping = {
        spec.name: spec.shards_per_worker
        for spec in STAGES
        if isinstance(spec, ShardedStage) and spec.shards_per_worker > 1
    }
    assert overlapping == {"logits": 2}
    config = open_run(
        Request(str(tiny_config)), str(tiny_config.parent / "run"), Console(quiet=True), local=True
    ).config
    for spec in STAGES:
        if isinstance(spec, ShardedStage):
            resources = spec.resources(config, "neox" if spec.name in ("logits", "align") else None)
            assert resources.shards_per_worker == overlapping.get(spec.name, 1)


def test_two_shards_at_once_give_the_rows_of_one_after_the_other(fresh: ShardJob) -> None:
    alone, done_alone = computed(fresh, "alone", dataclasses.replace(TWO, shards_per_worker=1))
    both, done_both = computed(fresh, "both", TWO)
    assert done_alone == done_both == set(range(fresh.num_shards))
    expected, found = rows_of(alone), rows_of(both)
    assert expected.keys() == found.keys()
    assert all(found[shard].equals(table) for shard, table in expected.items())
    assert sum(table.num_rows for table in found.values()) > 0


class MeetingStage:
    """A stage whose shards wait for each other: those of ``pairs`` are computed at once, or the test fails.

    Attributes:
        most_running: that were ever computed at once.
        order: shards in the order in which they began.
    """

    def __init__(self, worker: ShardWorker, on_run: Callable[[int], None] = lambda shard: None) -> None:
        self._on_run = on_run
        self._lock = threading.Lock()
        self._num_running = 0
        self.most_running = 0
        self.order: list[int] = []
        read = worker._read_inputs

        def read_numbered(shard: int) -> tuple[dict[str, pa.Table], dict]:
            tables, references = read(shard)
            return {"shard": tables["shard"].replace_schema_metadata({"number": str(shard)})}, references

        worker._read_inputs = read_numbered  # type: ignore[method-assign]
        worker._stage = self

    def setup(self) -> None: ...

    def run(self, inputs: Mapping[str, pa.Table]) -> StageOutput:
        shard = int(inputs["shard"].schema.metadata[b"number"])
        with self._lock:
            self._num_running += 1
            self.most_running = max(self.most_running, self._num_running)
            self.order.append(shard)
        try:
            self._on_run(shard)
            return StageOutput(inputs["shard"], num_tokens=1)
        finally:
            with self._lock:
                self._num_running -= 1


def at_once(worker: ShardWorker, *shards: int) -> list[str]:
    """Return the outcome and message of each shard, all of them begun together."""
    with ThreadPoolExecutor(len(shards)) as pool:
        return [f"{status.outcome} {status.message}".strip() for status in pool.map(worker.run, shards)]


def test_a_failing_shard_does_not_disturb_a_shard_computed_at_the_same_time(fresh: ShardJob) -> None:
    worker = ShardWorker(fresh)
    has_failed = threading.Event()

    def fail_first(shard: int) -> None:
        if shard == 0:
            has_failed.set()
            raise ValueError("the first is broken")
        assert has_failed.wait(PATIENCE_SECONDS)

    stage = MeetingStage(worker, fail_first)
    assert at_once(worker, 0, 1) == ["failed ValueError: the first is broken", "done"]
    assert stage.order.count(0) == 3
    store = Store(fresh.run_url)
    assert [bool(record.get("error")) for record in read_attempts(store, fresh.step.folder, 0)] == [True] * 3
    assert [bool(record.get("error")) for record in read_attempts(store, fresh.step.folder, 1)] == [False]


def test_both_shards_learn_that_the_models_cannot_be_loaded(fresh: ShardJob, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def refuse(self: LogitsStage) -> None:
        calls.append(self)
        raise ValueError("no such weights")

    monkeypatch.setattr(LogitsStage, "setup", refuse)
    assert at_once(ShardWorker(fresh), 0, 1) == ["failed set-up failed: ValueError: no such weights"] * 2
    assert len(calls) == 1
    assert read_attempts(Store(fresh.run_url), fresh.step.folder, 0) == []


def test_the_model_is_loaded_once_for_both(fresh: ShardJob, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    setup = LogitsStage.setup

    def load(self: LogitsStage) -> None:
        calls.append(self)
        setup(self)

    monkeypatch.setattr(LogitsStage, "setup", load)
    assert at_once(ShardWorker(fresh), 0, 1) == ["done", "done"]
    assert len(calls) == 1


def died(job: ShardJob, shard: int, launch: str) -> None:
    """Leave what a worker leaves that is killed."""
    assert isinstance(Attempt.begin(Store(job.run_url), job.step.folder, shard, launch, 3), Attempt)


@pytest.mark.parametrize(("launch", "most_running"), [("one", 1), ("another", 2)])
def test_a_shard_on_which_a_worker_died_has_the_next_worker_for_itself(
    fresh: ShardJob, launch: str, most_running: int
) -> None:
    died(fresh, 0, launch)
    worker = ShardWorker(fresh)
    meeting = threading.Barrier(2)

    def meet(shard: int) -> None:
        if most_running == 2:
            meeting.wait(PATIENCE_SECONDS)
        else:
            time.sleep(0.2)  # time for the other one to come in

    stage = MeetingStage(worker, meet)
    assert at_once(worker, 0, 1) == ["done", "done"]
    assert stage.most_running == most_running


def test_a_shard_that_kills_its_workers_does_not_fail_its_neighbour(
    fresh: ShardJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each death ends the attempts that are under way, all of which count; the command gives a shard three of them."""
    store, folder = Store(fresh.run_url), fresh.step.folder
    begin = Attempt.begin
    outcomes: list[str] = []
    neighbour_has_begun = threading.Event()
    for _ in range(4):
        is_dead = threading.Event()

        def kill(shard: int, is_dead: threading.Event = is_dead) -> None:
            if shard == 1:
                neighbour_has_begun.set()
            if shard == 0:
                assert neighbour_has_begun.wait(PATIENCE_SECONDS)  # the first worker has both shards when it dies
                is_dead.set()
            if is_dead.wait(2):
                raise KeyboardInterrupt  # the worker catches no such thing: the attempt stays as a kill leaves it

        def begin_alive(*arguments: object, is_dead: threading.Event = is_dead) -> Attempt | str:
            if is_dead.is_set():
                raise KeyboardInterrupt
            return begin(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(Attempt, "begin", begin_alive)
        worker = ShardWorker(fresh)
        MeetingStage(worker, kill)
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(worker.run, shard) for shard in (0, 1)]
        if not any(future.exception() for future in futures):
            outcomes = [f"{future.result().outcome} {future.result().message}" for future in futures]
            break
    died_always = "failed the worker died in every attempt (out of memory, or killed)"
    assert outcomes in ([died_always, "done "], [died_always, "already done "])
    assert store.read_manifest(folder, 1) is not None
    assert len(read_attempts(store, folder, 0)) == 3
    assert len(read_attempts(store, folder, 1)) == 2, "one lost with the first death, none with those after it"


def test_a_model_of_another_fold_waits_until_the_first_is_not_used(
    fresh: ShardJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = dataclasses.replace(fresh, models={fold: f"adapt/{fold}" for fold in FOLDS})
    worker = ShardWorker(job)
    loaded: list[str] = []
    used: set[str] = set()

    class FoldStage:
        def __init__(self, fold: str) -> None:
            self.fold = fold

        def run(self, inputs: Mapping[str, pa.Table]) -> StageOutput:
            used.add(self.fold)
            time.sleep(0.1)
            assert worker._fold == self.fold
            used.discard(self.fold)
            return StageOutput(inputs["shard"], num_tokens=1)

    def set_up() -> None:
        assert not used, "two models at once"
        loaded.append(worker._fold)
        worker._stage = FoldStage(worker._fold)  # type: ignore[assignment]

    read = ShardWorker._read_inputs

    def read_plain(shard: int) -> tuple[dict[str, pa.Table], dict]:
        plain = ShardWorker(fresh)
        return read(plain, shard)

    monkeypatch.setattr(worker, "_set_up", set_up)
    monkeypatch.setattr(worker, "_read_inputs", read_plain)
    shards = sorted(range(4), key=lambda shard: (fold_of(shard), shard))
    assert at_once(worker, *shards) == ["done"] * 4
    assert set(loaded) == set(FOLDS)


@pytest.mark.parametrize("num_pending", [1, 2, 3])
def test_in_one_process_as_many_shards_are_under_way_as_are_left_up_to_two(
    fresh: ShardJob, monkeypatch: pytest.MonkeyPatch, num_pending: int
) -> None:
    threads: set[int] = set()

    def note(shard: int) -> None:
        threads.add(threading.get_ident())
        if num_pending > 1 and shard < 2:
            meeting.wait(PATIENCE_SECONDS)

    meeting = threading.Barrier(2)
    assert list(run_two(fresh, note, monkeypatch, num_pending)) == ["done"] * num_pending
    if num_pending == 1:
        assert threads == {threading.get_ident()}, "a single shard needs no other thread"
    else:
        assert len(threads) == 2
        assert threading.get_ident() not in threads


def run_two(
    job: ShardJob, on_run: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, num_pending: int | None = None
) -> Iterator[str]:
    class Prepared(ShardWorker):
        def __init__(self, job: ShardJob) -> None:
            super().__init__(job)
            MeetingStage(self, on_run)

    monkeypatch.setattr(local_runner, "ShardWorker", Prepared)
    pending = range(job.num_shards if num_pending is None else num_pending)
    for status in local_runner.run_shards(job, pending, TWO, EngineConfig()):
        yield status.outcome


def test_storage_that_fails_ends_the_command_after_the_shard_under_way(
    fresh: ShardJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_failed = threading.Event()

    def fail_first(shard: int) -> None:
        if shard == 0:
            has_failed.set()
            raise StoreError("the disk is full")
        assert has_failed.wait(PATIENCE_SECONDS)

    with pytest.raises(StoreError, match="the disk is full"):
        list(run_two(fresh, fail_first, monkeypatch))
    assert set(Store(fresh.run_url).manifests(fresh.step.folder)) == {1}, "what was under way is kept; no more is begun"


def test_ctrl_c_ends_both_shards_at_once(fresh: ShardJob, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)

    def compute(shard: int) -> None:
        if both.wait(PATIENCE_SECONDS) == 0:
            os.kill(os.getpid(), signal.SIGINT)
        for _ in range(PATIENCE_SECONDS * 100):  # batches, between which Python runs
            time.sleep(0.01)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(run_two(fresh, compute, monkeypatch))
    assert time.monotonic() - started < PATIENCE_SECONDS
    assert not Store(fresh.run_url).manifests(fresh.step.folder)
    records = [record for shard in (0, 1) for record in read_attempts(Store(fresh.run_url), fresh.step.folder, shard)]
    assert [record.get("error") for record in records] == [None, None], "as after a kill: it may be run again"


def test_the_seconds_of_two_shards_at_once_are_the_time_that_passed(fresh: ShardJob) -> None:
    worker = ShardWorker(fresh)
    meeting = threading.Barrier(2)

    def meet(shard: int) -> None:
        meeting.wait(PATIENCE_SECONDS)
        time.sleep(0.5)

    MeetingStage(worker, meet)
    started = time.monotonic()
    assert at_once(worker, 0, 1) == ["done", "done"]
    passed = time.monotonic() - started
    manifests = Store(fresh.run_url).manifests(fresh.step.folder)
    assert 0.5 <= sum(manifest.seconds for manifest in manifests.values()) <= passed + 0.01
    assert stage_spec("logits").name == fresh.step.stage
