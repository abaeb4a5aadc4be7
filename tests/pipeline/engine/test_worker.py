"""One shard: attempts, races, quarantine."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline.engine.sharded_stage import run_stage
from pipeline.engine.worker import ShardJob, ShardWorker
from pipeline.run.attempts import Attempt, forget_failures, read_attempts
from pipeline.run.session import StageError, open_run
from pipeline.run.shard_plan import freeze_plan
from pipeline.run.steps import Request, Step
from stages.contract.manifest import choices_key, manifest_key
from stages.contract.stage import StageOutput
from stages.contract.store import Store
from tests.train.fused_files import fused_table

STEP = "shard"


def job_for(
    config: Path, run_url: str, *, overrides: tuple[str, ...] = (), launch: str = "one", key: str = STEP
) -> tuple[ShardJob, Store]:
    run = open_run(Request(str(config), overrides), run_url, Console(quiet=True), local=True)
    plan = freeze_plan(run.resolved, run.store)
    step: Step = run.resolved.steps[key]
    job = ShardJob(
        run_url=run_url,
        config_json=run.config.model_dump_json(by_alias=True),
        step=step,
        input_folders={},
        shard_folder=run.resolved.steps[STEP].folder,
        num_shards=plan.num_shards,
        launch=launch,
        max_attempts=3,
    )
    return job, run.store


def test_shard_is_computed_once(tiny_config: Path, tmp_path: Path) -> None:
    job, store = job_for(tiny_config, str(tmp_path))
    assert ShardWorker(job).run(0).outcome == "done"
    assert ShardWorker(job).run(0).outcome == "already done"
    assert len(read_attempts(store, job.step.folder, 0)) == 1


def test_slower_of_two_attempts_leaves_nothing(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, store = job_for(tiny_config, str(tmp_path))
    slow, fast = ShardWorker(job), ShardWorker(job)
    write = ShardWorker._write

    def overtaken(self, *arguments):
        manifest = write(self, *arguments)
        if self is slow:
            assert fast.run(0).outcome == "done"
        return manifest

    monkeypatch.setattr(ShardWorker, "_write", overtaken)
    assert slow.run(0).outcome == "already done"
    manifest = store.read_manifest(job.step.folder, 0)
    assert manifest is not None
    assert manifest.attempt == 2
    assert [f"{job.step.folder}/data/{name}" for name in store.names(f"{job.step.folder}/data")] == [manifest.data.key]


def test_worker_deaths_are_counted_within_a_command(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for number in (1, 2, 3):
        attempt = Attempt.begin(store, "f", 0, "launch-1", 3)
        assert isinstance(attempt, Attempt)
        assert attempt.number == number
    assert "worker died in every attempt" in str(Attempt.begin(store, "f", 0, "launch-1", 3))
    assert isinstance(Attempt.begin(store, "f", 0, "launch-2", 3), Attempt), "a new command starts afresh"


def test_errors_are_counted_forever(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for launch in ("a", "b", "c"):
        attempt = Attempt.begin(store, "f", 0, launch, 3)
        assert isinstance(attempt, Attempt)
        attempt.fail(store, ValueError("broken record 7"))
    assert Attempt.begin(store, "f", 0, "d", 3) == "ValueError: broken record 7"


@pytest.mark.parametrize("shown", [False, True])
def test_a_failing_shard_is_reported_once_without_traceback_unless_requested(
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    shown: bool,
) -> None:
    job, _ = job_for(tiny_config, str(tmp_path))
    monkeypatch.setenv("PTAFUSE_TRACEBACK", "1" if shown else "0")
    monkeypatch.setattr(ShardWorker, "_read_inputs", lambda *_: {}["no such key"])
    found = ShardWorker(job).run(0)
    assert (found.outcome, found.message) == ("failed", "KeyError: 'no such key'")
    assert caplog.text.count("Traceback") == (3 if shown else 0)
    assert caplog.text.count("shard shard 0") == (3 if shown else 1)


@pytest.mark.parametrize("shown", [False, True])
def test_a_failed_set_up_is_reported_without_traceback_unless_requested(
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    shown: bool,
) -> None:
    job, _ = job_for(tiny_config, str(tmp_path))
    monkeypatch.setenv("PTAFUSE_TRACEBACK", "1" if shown else "")

    def refuse(*_: object) -> None:
        raise ValueError("model llama: no good")

    monkeypatch.setattr("stages.shard.stage.ShardStage.setup", refuse)
    worker = ShardWorker(job)
    assert {worker.run(shard).message for shard in (0, 1)} == {"set-up failed: ValueError: model llama: no good"}
    assert caplog.text.count("Traceback") == int(shown)
    assert ("no good" in caplog.text) == shown


def corpus_with_bad_line(config: Path, folder: Path, *more: str) -> Path:
    corpus = folder / "corpus.jsonl"
    lines = ('{"text": "good"}', '{"text": 7}', '{"text": "also good"}', '{"text": "fine"}', *more)
    corpus.write_text("".join(f"{line}\n" for line in lines))
    toml = folder / "bad.toml"
    toml.write_text(config.read_text().replace(str(config.parent / "corpus.jsonl"), str(corpus)))
    return toml


def test_bad_record_goes_to_quarantine_and_is_counted(tiny_config: Path, tmp_path: Path) -> None:
    toml = corpus_with_bad_line(tiny_config, tmp_path)
    job, store = job_for(toml, str(tmp_path / "run"), overrides=("shard.max_bad_fraction=0.5",))
    assert ShardWorker(job).run(0).outcome == "done"
    manifest = store.read_manifest(job.step.folder, 0)
    assert manifest is not None
    assert manifest.quarantine is not None
    assert (manifest.num_rows_in, manifest.num_rows_out, manifest.num_quarantined) == (4, 3, 1)
    record = store.read_table(manifest.quarantine, remake="").to_pylist()[0]
    assert record["doc_id"] == 1
    assert record["stage"] == "shard"
    assert record["message"]


def test_shard_with_too_many_bad_records_fails_and_retry_forgets_it(tiny_config: Path, tmp_path: Path) -> None:
    toml = corpus_with_bad_line(tiny_config, tmp_path)
    request = Request(str(toml), ("shard.max_bad_fraction=0.1",))
    run = open_run(request, str(tmp_path / "run"), Console(quiet=True), local=True)
    with pytest.raises(StageError, match=r"(?s)1 of 1 shards failed:.*1 of 4 records.*ptafuse retry"):
        run_stage(run, "shard")
    step = run.resolved.steps["shard"]
    assert not run.store.exists(manifest_key(step.folder, 0))
    assert run.store.names(f"{step.folder}/data") == []
    assert forget_failures(run.resolved, run.store) == 1
    assert read_attempts(run.store, step.folder, 0) == []


def test_too_many_bad_records_are_counted_by_reason_with_the_setting_that_allows_them(
    tiny_config: Path, tmp_path: Path
) -> None:
    toml = corpus_with_bad_line(tiny_config, tmp_path, '{"text": null}', "{broken", '{"text": "good"}')
    one_shard = "shard.documents_per_shard=7"
    job, _ = job_for(toml, str(tmp_path / "run"), overrides=(one_shard,))
    message = ShardWorker(job).run(0).message
    assert "3 of 7 records of shard shard 0 are bad" in message
    assert "shard.max_bad_fraction = 0.01 allows: 2 BadRecordLine, 1 NullText. The first one: document 1," in message
    assert message.endswith("set shard.max_bad_fraction to 0.43, or more for other shards")
    job, _ = job_for(toml, str(tmp_path / "other"), overrides=(one_shard, "shard.max_bad_fraction=0.43"))
    assert ShardWorker(job).run(0).outcome == "done"


def test_stage_before_its_input_names_the_command(tiny_config: Path, tmp_path: Path) -> None:
    run = open_run(Request(str(tiny_config)), str(tmp_path / "run"), Console(quiet=True), local=True)
    with pytest.raises(StageError, match="shard has not run yet: run `make shard CONFIG="):
        run_stage(run, "logits")
    run_stage(run, "shard")
    with pytest.raises(StageError, match=r"logits/llama is incomplete \(0 of 6 shards\): run `make logits CONFIG="):
        run_stage(run, "align")


def test_manifest_says_what_the_shard_was_made_from(tiny_config: Path, tmp_path: Path) -> None:
    job, store = job_for(tiny_config, str(tmp_path))
    ShardWorker(job).run(1)
    raw = json.loads(store.read(manifest_key(job.step.folder, 1)))
    assert raw["fingerprint"] == job.step.fingerprint
    assert raw["inputs"]["plan"]["folder"] == job.step.folder
    assert raw["settings"]["shard"]["max_length"] == 64
    assert set(raw["versions"]) >= {"python", "torch", "transformers", "pyarrow"}
    assert raw["num_tokens"] > 0


class GivesTable:
    """A stage whose rows are given."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def setup(self) -> None: ...

    def run(self, inputs: object) -> StageOutput:
        return StageOutput(self.table, num_tokens=1)


@pytest.mark.parametrize(("key", "most_bytes"), [("fuse", 2**20), ("align/neox", 64 * 2**20)])
def test_row_groups_are_small_where_single_rows_are_read(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, most_bytes: int
) -> None:
    """Training reads blocks in a random order, and decodes a row group for each; other stages read whole files."""
    blocks = fused_table([np.arange(512) % 50] * 8, 50)
    table = pa.concat_tables([blocks] * 40).combine_chunks()
    job, store = job_for(tiny_config, str(tmp_path), key=key)
    worker = ShardWorker(job)
    monkeypatch.setattr(worker, "_stage", GivesTable(table))
    monkeypatch.setattr(worker, "_read_inputs", lambda shard: ({"rows": table}, {}))
    assert worker.run(0).outcome == "done"
    manifest = store.read_manifest(job.step.folder, 0)
    assert manifest is not None
    metadata = pq.read_metadata(store.path(manifest.data.key))
    groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    bytes_a_row = table.nbytes / table.num_rows
    assert sum(groups) == table.num_rows
    assert max(groups) * bytes_a_row <= most_bytes
    assert all(rows * bytes_a_row > 0.9 * most_bytes for rows in groups[:-1])


def test_a_row_group_holds_a_row_that_is_larger_than_it_should_be(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_table("a.parquet", fused_table([np.arange(64) % 50] * 3, 50), row_group_bytes=1)
    assert pq.read_metadata(store.path("a.parquet")).num_row_groups == 3


def test_a_worker_with_a_reserved_gpu_that_torch_does_not_see_computes_nothing(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would compute on CPUs, and settle backend = "auto" as transformers for the whole folder."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    job, store = job_for(tiny_config, str(tmp_path), key="logits/llama", overrides=('logits.backend="auto"',))
    status = ShardWorker(dataclasses.replace(job, gpus=1.0)).run(0)
    assert status.outcome == "failed"
    assert "logits/llama has a GPU reserved on" in status.message
    assert not store.exists(choices_key(job.step.folder))
    assert not read_attempts(store, job.step.folder, 0), "no fault of the shard's"
