"""``ptafuse gc``: removes what no manifest names, and nothing else."""

import json
import os
import shutil
import socket
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from pipeline.display.durations import DAY_SECONDS
from pipeline.state.garbage import Garbage, collect_garbage, find_garbage
from stages.contract.manifest import DataFile, Manifest, attempts_folder, data_key, manifest_key, quarantine_key
from stages.contract.store import Store
from tests.tiny_run import ptafuse

LONG_AGO = time.time() - 3 * DAY_SECONDS
STEPS = ("shard", "logits/llama", "align/neox", "fuse")
FINGERPRINT = "0123456789ab"
OTHER = "ba9876543210"


def collect(store: Store, *, older_than: float = DAY_SECONDS, dry_run: bool = False) -> Garbage:
    return collect_garbage(store, Console(quiet=True), older_than_seconds=older_than, dry_run=dry_run)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def put(folder: Path, key: str, *, age: float = 3 * DAY_SECONDS, raw: bytes = b"x") -> str:
    path = folder / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    os.utime(path, (time.time() - age,) * 2)
    return key


def manifest(step: str, fingerprint: str, shard: int, data: str, quarantine: str | None) -> bytes:
    zero = {"num_rows_in": 1, "num_rows_out": 1, "num_quarantined": 0, "num_tokens": 1, "health": {}, "seconds": 1.0}
    return Manifest(
        stage=step, shard=shard, num_shards=9, fingerprint=fingerprint, settings={}, inputs={},
        data=DataFile(key=data, sha256="0", num_bytes=1),
        quarantine=DataFile(key=quarantine, sha256="0", num_bytes=1) if quarantine else None,
        attempt=1, host="h", versions={}, **zero,
    ).to_bytes()  # fmt: skip


def outputs(folder: Path, step: str, shard: int, attempt: str, *, named: bool, **age: float) -> list[str]:
    """Data and quarantine of one attempt, and their manifest if it was the one that was published."""
    where = f"{step}/{FINGERPRINT}"
    data = put(folder, data_key(where, shard, 9, attempt), **age)
    bad = put(folder, quarantine_key(where, shard, attempt), **age)
    if named:
        put(folder, manifest_key(where, shard), raw=manifest(step, FINGERPRINT, shard, data, bad), **age)
    return [data, bad]


def test_files_of_killed_and_overtaken_attempts_are_removed(tmp_path: Path) -> None:
    outputs(tmp_path, "align/neox", 3, "2-11111111", named=True)
    overtaken = outputs(tmp_path, "align/neox", 3, "1-22222222", named=False)
    killed = outputs(tmp_path, "shard", 4, "1-33333333", named=False)
    before = files(tmp_path)
    found = collect(Store(str(tmp_path)))
    assert {entry.key for entry in found.files} == {*overtaken, *killed}
    assert files(tmp_path) == before - {*overtaken, *killed}


def test_dry_run_removes_nothing_and_says_what_it_would(tmp_path: Path) -> None:
    lost = outputs(tmp_path, "fuse", 0, "1-22222222", named=False)
    shown = ptafuse("gc", str(tmp_path), "--dry-run").stdout
    assert all(f"would remove {key} (1 bytes)" in shown for key in lost)
    assert "2 files, 2 bytes would be removed" in shown
    assert files(tmp_path) == set(lost)
    shown = ptafuse("gc", str(tmp_path)).stdout
    assert "2 files, 2 bytes removed" in shown
    assert files(tmp_path) == set()


def test_young_files_stay_unless_asked_for(tmp_path: Path) -> None:
    young = outputs(tmp_path, "fuse", 0, "1-22222222", named=False, age=3600)
    found = collect(Store(str(tmp_path)))
    assert found.files == ()
    assert [entry.key for entry in found.kept] == young
    assert "2 files that no manifest names stay: younger than 1 d 0 h" in ptafuse("gc", str(tmp_path)).stdout
    ptafuse("gc", str(tmp_path), "--older-than", "30m")
    assert files(tmp_path) == set()


@pytest.mark.parametrize(("pid", "stays"), [(os.getpid(), True), (2**22 + 1, False)])
def test_files_of_a_running_attempt_stay(tmp_path: Path, pid: int, stays: bool) -> None:
    temporary = f"fuse/{FINGERPRINT}/data/.shard-00002-of-00009.1-22222222.parquet.deadbeef.tmp"
    lost = [*outputs(tmp_path, "fuse", 2, "1-22222222", named=False), put(tmp_path, temporary)]
    record = {"attempt": 1, "host": socket.gethostname(), "pid": pid, "started": time.time() - 7200}
    where = f"{attempts_folder(f'fuse/{FINGERPRINT}', 2)}/1-22222222.json"
    put(tmp_path, where, raw=json.dumps(record).encode())
    collect(Store(str(tmp_path)), older_than=60)
    assert files(tmp_path) == ({*lost, where} if stays else {where})


def test_files_of_others_and_of_training_stay(tmp_path: Path) -> None:
    kept = {
        put(tmp_path, key)
        for key in (
            f"fuse/{FINGERPRINT}/data/notes.txt",
            f"fuse/{FINGERPRINT}/data/my-shard-00001-of-00009.1-22222222.parquet",
            f"fuse/{FINGERPRINT}/shard-00001-of-00009.1-22222222.parquet",
            f"fuse/{FINGERPRINT}/choices.json",
            f"fuse/{FINGERPRINT}/rollups/00100-22222222.jsonl",
            f"fuse/{FINGERPRINT}/attempts/shard-00001/1-22222222.json",
            f"shard/{FINGERPRINT}/plan.jsonl",
            "fuse/old/data/shard-00001-of-00009.1-22222222.parquet",
            "configs/demo-22222222.json",
            f"train/{FINGERPRINT}/checkpoint-000500/model.safetensors",
            f"train/{FINGERPRINT}/.checkpoint-000500.22222222.tmp/model.safetensors",
            f"train/{FINGERPRINT}/model/model.safetensors",
            f"eval/llama/{FINGERPRINT}/bits-per-byte.json",
            "README.md",
        )
    }
    assert collect(Store(str(tmp_path))).files == ()
    assert files(tmp_path) == kept


def test_temporary_files_are_removed_when_old(tmp_path: Path) -> None:
    for key in ("manifests/.shard-00001.json.deadbeef.tmp", ".plan.jsonl.deadbeef.tmp"):
        put(tmp_path, f"shard/{FINGERPRINT}/{key}")
    put(tmp_path, "configs/.x.json.deadbeef.tmp")
    young = put(tmp_path, f"shard/{FINGERPRINT}/attempts/shard-00001/.1-22222222.json.deadbeef.tmp", age=60)
    assert len(collect(Store(str(tmp_path))).files) == 3
    assert files(tmp_path) == {young}


def test_manifest_that_cannot_be_read_stops_everything(tmp_path: Path) -> None:
    lost = outputs(tmp_path, "fuse", 2, "1-22222222", named=False)
    put(tmp_path, manifest_key(f"align/neox/{FINGERPRINT}", 0), raw=b"{}")
    stopped = ptafuse("gc", str(tmp_path), check=False)
    assert stopped.returncode == 1
    assert "is not a manifest that this version of ptafuse can read" in stopped.stderr
    assert "ptafuse verify" in stopped.stderr
    assert files(tmp_path) > set(lost)


def test_file_published_after_the_listing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = outputs(tmp_path, "fuse", 2, "1-22222222", named=False)
    other = outputs(tmp_path, "fuse", 1, "1-11111111", named=True)
    listed = Store.files

    def slow(self: Store, folder: str) -> list:
        entries = listed(self, folder)
        if folder == "configs":  # the last one: a worker that hung for three days publishes now
            key = manifest_key(f"fuse/{FINGERPRINT}", 2)
            put(tmp_path, key, raw=manifest("fuse", FINGERPRINT, 2, kept[0], kept[1]))
        return entries

    monkeypatch.setattr(Store, "files", slow)
    collect(Store(str(tmp_path)))
    assert files(tmp_path) >= {*kept, *other}


def test_object_store_is_collected_by_its_own_times(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("memory://gc-run")
    lost = data_key(f"fuse/{FINGERPRINT}", 0, 9, "1-22222222")
    named = data_key(f"fuse/{FINGERPRINT}", 0, 9, "2-22222222")
    for key in (lost, named):
        store.replace(key, b"x")
    store.replace(manifest_key(f"fuse/{FINGERPRINT}", 0), manifest("fuse", FINGERPRINT, 0, named, None))
    assert collect(store).files == ()
    for file in store._fs.store.values():
        file.created = datetime.fromtimestamp(LONG_AGO, UTC)
    assert [entry.key for entry in collect(store).files] == [lost]
    assert not store.exists(lost)
    assert store.exists(named)


def test_file_of_unknown_age_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [data, _] = outputs(tmp_path, "fuse", 2, "1-22222222", named=False)
    store = Store(str(tmp_path))
    entries = [replace(entry, modified=None) for entry in store.files("fuse")]
    monkeypatch.setattr(Store, "files", lambda self, folder: entries if folder == "fuse" else [])
    assert find_garbage(store, older_than_seconds=0).files == ()
    assert (tmp_path / data).exists()


@st.composite
def trees(draw: st.DrawFn) -> list[tuple[str, int, str, str, float]]:
    """Attempts: step, shard, attempt, what became of it, age of its files in days."""
    one = st.tuples(
        st.sampled_from(STEPS),
        st.integers(0, 3),
        st.from_regex(r"[1-3]-[0-9a-f]{8}", fullmatch=True),
        st.sampled_from(["published", "lost", "temporary"]),
        st.sampled_from([0.1, 0.9, 1.1, 30.0]),
    )
    return draw(st.lists(one, max_size=12, unique_by=lambda attempt: attempt[2]))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trees")


@given(tree=trees())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_tree_keeps_what_is_named_or_young_and_loses_the_rest(root: Path, tree: list) -> None:
    shutil.rmtree(root, ignore_errors=True)
    stays, goes = set(), set()
    for step, shard, attempt, fate, days in tree:
        folder, age = f"{step}/{FINGERPRINT}", days * DAY_SECONDS
        key = data_key(folder, shard, 9, attempt)
        proof = manifest_key(folder, shard)
        if fate == "temporary":
            key = key.replace("/data/", "/data/.") + ".0a1b2c3d.tmp"
        put(root, key, age=age)
        if fate == "published" and proof not in stays:
            put(root, proof, raw=manifest(step, FINGERPRINT, shard, key, None), age=age)
            stays |= {key, proof}
        else:
            (goes if days > 1 else stays).add(key)
    garbage = collect(Store(str(root)))
    assert {entry.key for entry in garbage.files} == goes
    assert files(root) == stays


@pytest.mark.slow
def test_finished_run_has_no_garbage_and_verifies_after_gc(undisturbed_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(undisturbed_run, tmp_path / "run"))
    before = files(run)
    assert collect(Store(str(run)), older_than=0) == Garbage((), ())
    assert files(run) == before
    lost = sorted(run.glob("align/neox/*/manifests/*.json"))[0]
    data = json.loads(lost.read_text())["data"]["key"]
    lost.unlink()
    assert [entry.key for entry in collect(Store(str(run)), older_than=0).kept] == [data], "this process lives"
    for path in run.glob("align/neox/*/attempts/shard-00000/*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "pid": 2**22 + 1}))
    assert [entry.key for entry in collect(Store(str(run)), older_than=0).files] == [data]
    assert ptafuse("verify", str(run)).returncode == 0
