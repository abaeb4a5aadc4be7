"""Copies of checkpoints in an object store; here fsspec's, in this process's memory."""

import hashlib
import json
import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.contract.store import Store, StoreError
from tests.train.conftest import job_in
from tests.train.model.test_card import RECORD
from train.checkpoints.folders import COMMITTED, committed_steps
from train.checkpoints.mirror import CheckpointMirror
from train.distributed import Peers
from train.loop import train
from train.preemption import Notice, StoppedError
from train.run_log import RunLog, read_log


def checkpoint(output: Path, step: int, text: str = "weights") -> Path:
    """Return a committed checkpoint's folder, and a log beside it."""
    folder = output / f"checkpoint-{step:06d}"
    folder.mkdir(parents=True)
    for name in ("__0_0.distcp", ".metadata", "state.json"):
        (folder / name).write_text(f"{text} {name} {step}")
    (folder / COMMITTED).write_text("x\n")
    return folder


def put(mirror: CheckpointMirror, output: Path, step: int) -> None:
    checkpoint(output, step)
    mirror.put(step, output)


def write_log(output: Path, *, steps: int) -> None:
    output.mkdir()
    with RunLog(output, step=0) as log:
        for step in range(1, steps + 1):
            log.add(replace(RECORD, step=step))


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"memory:/{tmp_path}"


@pytest.fixture
def mirror(url: str) -> CheckpointMirror:
    return CheckpointMirror(url, keep=2)


def names(url: str) -> list[str]:
    return Store(url).names("")


def test_newest_copy_comes_back_whole_with_the_log(mirror, tmp_path):
    write_log(tmp_path / "here", steps=5)
    for step in (2, 4):
        put(mirror, tmp_path / "here", step)
    assert mirror.fetch(tmp_path / "there") == 4
    folder = tmp_path / "there" / "checkpoint-000004"
    assert committed_steps(tmp_path / "there") == [4]
    assert sorted(path.name for path in folder.iterdir()) == [".metadata", COMMITTED, "__0_0.distcp", "state.json"]
    assert (folder / "__0_0.distcp").read_text() == "weights __0_0.distcp 4"
    assert [record.step for record in read_log(tmp_path / "there")] == [1, 2, 3, 4], "up to the checkpoint's step"


def test_nothing_is_fetched_where_the_checkpoint_here_is_as_new(mirror, tmp_path):
    assert mirror.fetch(tmp_path / "here") is None
    put(mirror, tmp_path / "here", 2)
    assert mirror.fetch(tmp_path / "here") is None
    newer = checkpoint(tmp_path / "here", 3, "newer")
    assert mirror.fetch(tmp_path / "here") is None
    assert (newer / "state.json").read_text() == "newer state.json 3"


def test_older_copies_and_torn_ones_go_when_a_newer_one_is_complete(mirror, url, tmp_path):
    Store(url).replace("checkpoint-000001/__0_0.distcp", b"of an upload that was killed")
    Store(url).replace("model/model.safetensors", b"the trained model")
    for step in (2, 4, 6):
        put(mirror, tmp_path / "here", step)
    found = [name for name in names(url) if Store(url).files(name)]
    assert found == ["checkpoint-000004", "checkpoint-000006", "model"]
    mirror.remove()
    assert [name for name in names(url) if Store(url).files(name)] == ["model"]


def test_upload_that_dies_leaves_the_copies_before_it(mirror, url, tmp_path, monkeypatch):
    for step in (2, 4):
        put(mirror, tmp_path / "here", step)
    upload = Store.upload

    def killed(self, key, file):
        if file.name == "state.json":
            raise KeyboardInterrupt
        upload(self, key, file)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "upload", killed)
        with pytest.raises(KeyboardInterrupt):
            put(mirror, tmp_path / "here", 6)
    assert "checkpoint-000006" in names(url)
    assert mirror.fetch(tmp_path / "there") == 4


def test_same_step_is_copied_again_whole_or_not_at_all(mirror, url, tmp_path, monkeypatch):
    """As where a killed training went on from an older checkpoint, and came by this step again."""
    for step in (2, 4):
        put(mirror, tmp_path / "here", step)
    checkpoint(tmp_path / "again", 4, "again")

    def killed(self, key, raw):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            mirror.put(4, tmp_path / "again")
    assert mirror.fetch(tmp_path / "there") == 2
    mirror.put(4, tmp_path / "again")
    assert mirror.fetch(tmp_path / "there") == 4
    assert (tmp_path / "there" / "checkpoint-000004" / "state.json").read_text() == "again state.json 4"


def test_store_that_stays_away_does_not_end_the_training(mirror, tmp_path, monkeypatch, caplog):
    def away(self, key, file):
        raise StoreError("no useful answer for 300 seconds")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(Store, "upload", away)
        put(mirror, tmp_path / "here", 2)
    assert "checkpoint-000002 could not be copied to" in caplog.text
    put(mirror, tmp_path / "here", 4)
    assert mirror.fetch(tmp_path / "there") == 4


@pytest.mark.parametrize("damage", ["changed", "missing", "list", "list of files", "no log"])
def test_damaged_copy_is_passed_over(mirror, url, tmp_path, damage, caplog):
    for step in (2, 4):
        put(mirror, tmp_path / "here", step)
    store = Store(url)
    committed = f"checkpoint-000004/{COMMITTED}"
    if damage == "missing":
        store.delete("checkpoint-000004/state.json")
    elif damage == "list of files":
        store.replace(committed, b'{"files": ["state.json"]}')
    elif damage == "no log":
        files = json.loads(store.read(committed))["files"]
        store.replace(committed, json.dumps({"files": {"state.json": files["state.json"]}}).encode())
    else:
        store.replace(f"checkpoint-000004/{COMMITTED if damage == 'list' else 'state.json'}", b"[]")
    assert mirror.fetch(tmp_path / "there") == 2
    assert committed_steps(tmp_path / "there") == [2]
    assert "the copy of step 4 cannot be used" in caplog.text


@pytest.mark.parametrize("kind", ["parent", "absolute"])
def test_copy_may_not_write_outside_its_folder(mirror, url, tmp_path, kind):
    put(mirror, tmp_path / "here", 2)
    name = "../../../outside" if kind == "parent" else str(tmp_path / "outside")
    if kind == "absolute":  # an object store has such names
        Store(url).replace(f"checkpoint-000002/{name}", b"anything")
    digest = hashlib.sha256(b"anything").hexdigest()
    Store(url).replace(f"checkpoint-000002/{COMMITTED}", json.dumps({"files": {name: digest}}).encode())
    with pytest.raises(ValueError, match="is not a path inside the run directory"):
        mirror.fetch(tmp_path / "there")
    assert not (tmp_path / "outside").exists()


def test_training_resumes_from_the_copy_when_its_folder_is_lost(tiny_job, tmp_path, url):
    train(job_in(tiny_job, tmp_path / "plain"))
    job = replace(job_in(tiny_job, tmp_path / "run"), checkpoint_store=url)
    answers = iter([Notice.NONE, Notice.NONE, Notice.NONE, Notice.STOP])
    with pytest.raises(StoppedError):
        train(job, watch=lambda: next(answers))
    shutil.rmtree(tmp_path / "run")
    assert CheckpointMirror(url, keep=2).fetch(tmp_path / "run") == 4
    computed = []
    train(job, on_step=lambda record: computed.append(record.step))
    assert computed == [5, 6]
    found, expected = read_log(tmp_path / "run"), read_log(tmp_path / "plain")
    assert [(r.step, r.loss, r.blocks) for r in found] == [(r.step, r.loss, r.blocks) for r in expected]
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "plain")]
    assert weights[0] == weights[1]
    published = ["log.jsonl", "manifest.json", "model"]
    assert [name for name in names(url) if Store(url).files(name)] == [
        "checkpoint-000004",
        "checkpoint-000006",
        *published,
    ]
    assert Store(url).read("model/model.safetensors") == weights[0]


class ThreadPeers(Peers):
    """Workers as threads of this process."""

    def __init__(self, rank: int, barrier: threading.Barrier, values: list[Any]) -> None:
        super().__init__(rank, len(values), None)
        object.__setattr__(self, "_barrier", barrier)
        object.__setattr__(self, "_values", values)

    def gather(self, value: Any) -> list[Any]:
        self._values[self.rank] = value
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()
        return found


def together(work: Callable[[Peers], Any], size: int = 2) -> list[Any]:
    """What each of some workers comes to."""
    barrier, values = threading.Barrier(size, timeout=30), [None] * size
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(ThreadPeers(rank, barrier, values)), range(size)))


def scattered_checkpoint(folder: Path, step: int) -> list[Path]:
    """Return the output folders of two machines, each with its own worker's shards."""
    outputs = [folder / "node-0", folder / "node-1"]
    for rank, output in enumerate(outputs):
        there = output / f"checkpoint-{step:06d}"
        there.mkdir(parents=True)
        (there / f"__{rank}_0.distcp").write_text(f"shards of worker {rank}")
    for name in (".metadata", "state.json"):
        (outputs[0] / f"checkpoint-{step:06d}" / name).write_text(name)
    (outputs[1] / f"checkpoint-{step:06d}" / ".__1_0.distcp.0a1b2c3d.tmp").write_text("half a file")
    return outputs


def test_each_worker_uploads_its_own_shards_and_all_are_committed_as_one(mirror, url, tmp_path):
    outputs = scattered_checkpoint(tmp_path, 2)
    assert together(lambda peers: mirror.put(2, outputs[peers.rank], peers)) == [True, True]
    files = json.loads(Store(url).read(f"checkpoint-000002/{COMMITTED}"))["files"]
    assert sorted(files) == [".metadata", "__0_0.distcp", "__1_0.distcp", "log.jsonl", "state.json"]
    assert mirror.fetch(tmp_path / "one machine") == 2
    assert (tmp_path / "one machine" / "checkpoint-000002" / "__1_0.distcp").read_text() == "shards of worker 1"


def test_upload_that_fails_on_one_worker_commits_nothing(mirror, url, tmp_path, monkeypatch, caplog):
    outputs = scattered_checkpoint(tmp_path, 2)
    upload = Store.upload

    def away(self, key, file):
        if file.name == "__1_0.distcp":
            raise StoreError("no useful answer for 300 seconds")
        upload(self, key, file)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(Store, "upload", away)
        assert together(lambda peers: mirror.put(2, outputs[peers.rank], peers)) == [False, False]
    assert "the next checkpoint will be copied: worker 1: no useful answer for 300 seconds" in caplog.text
    assert not Store(url).exists(f"checkpoint-000002/{COMMITTED}")
    assert mirror.fetch(tmp_path / "there") is None
    assert together(lambda peers: mirror.put(2, outputs[peers.rank], peers)) == [True, True]


def test_workers_bring_what_they_need_and_what_is_on_their_disk_is_not_fetched(mirror, tmp_path, monkeypatch):
    outputs = scattered_checkpoint(tmp_path, 2)
    together(lambda peers: mirror.put(2, outputs[peers.rank], peers))
    (outputs[1] / "checkpoint-000002" / "__1_0.distcp").write_text("damaged")
    download, fetched = Store.download, []

    def counted(self, key, file):
        fetched.append((file.parent.parent.name, file.name))
        download(self, key, file)

    monkeypatch.setattr(Store, "download", counted)

    def bring(peers: Peers) -> bool:
        (copy,) = mirror.copies(peers)
        return mirror.bring(copy, ["state.json", f"__{peers.rank}_0.distcp"], outputs[peers.rank], peers)

    assert together(bring) == [True, True]
    assert sorted(fetched) == [("node-1", "__1_0.distcp"), ("node-1", "state.json")]
    assert (outputs[1] / "checkpoint-000002" / "__1_0.distcp").read_text() == "shards of worker 1"


def test_workers_of_one_disk_share_the_download(mirror, tmp_path, monkeypatch):
    outputs = scattered_checkpoint(tmp_path, 2)
    together(lambda peers: mirror.put(2, outputs[peers.rank], peers))
    download, fetched = Store.download, []

    def counted(self, key, file):
        fetched.append(file.name)
        download(self, key, file)

    monkeypatch.setattr(Store, "download", counted)
    assert together(lambda peers: mirror.fetch(tmp_path / "shared", peers)) == [2, 2]
    assert sorted(fetched) == [".metadata", "__0_0.distcp", "__1_0.distcp", "log.jsonl", "state.json"], "each once"
    assert committed_steps(tmp_path / "shared") == [2]
