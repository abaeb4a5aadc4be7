"""The fault table of docs/faults.md: at each crash point, what is on disk, and what a restart does."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.contract.filesystem import StoreError
from stages.contract.store import Store
from tests.faults.conftest import StageProcess, Undisturbed
from tests.faults.racing import race
from tests.tiny_run import REPOSITORY, data_hashes, environment, ptafuse, ptafuse_process, status

pytestmark = pytest.mark.slow

VICTIM = 2


@pytest.fixture
def run_without_fuse(undisturbed_run: Path, tmp_path: Path) -> Path:
    return without_fuse(undisturbed_run, tmp_path / "run")


def without_fuse(run: Path, copy: Path) -> Path:
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "fuse")
    return copy


def files_of_victim(run: Path) -> tuple[list[str], list[dict], bool]:
    """Names in data/, recorded attempts, and whether there is a manifest."""
    folder = next(run.glob("fuse/*"))
    data = sorted(path.name for path in folder.glob(f"data/*shard-{VICTIM:05d}*"))
    attempts = [json.loads(path.read_text()) for path in folder.glob(f"attempts/shard-{VICTIM:05d}/*.json")]
    return data, attempts, (folder / f"manifests/shard-{VICTIM:05d}.json").exists()


@pytest.mark.parametrize(
    ("point", "data_left", "manifest_left", "attempts_after"),
    [
        ("compute", None, False, 2),
        ("mid-write", r"\.shard-00002-of-00006\..+\.tmp", False, 2),
        ("data", r"shard-00002-of-00006\..+\.parquet", False, 2),
        ("manifest", r"shard-00002-of-00006\..+\.parquet", True, 1),
    ],
)
def test_process_killed_at_a_crash_point(
    stage_process: StageProcess,
    undisturbed: Undisturbed,
    tmp_path: Path,
    point: str,
    data_left: str | None,
    manifest_left: bool,
    attempts_after: int,
) -> None:
    run = without_fuse(undisturbed.run, tmp_path / "run")
    ended = stage_process(undisturbed.config, str(run), "fuse", fault=f"die@{point}:fuse:{VICTIM}:{tmp_path}")
    assert ended.code == -signal.SIGKILL
    data, attempts, has_manifest = files_of_victim(run)
    assert has_manifest == manifest_left
    assert len(attempts) == 1
    assert "error" not in attempts[0]
    assert [bool(re.fullmatch(data_left or "nothing", name)) for name in data] == [True] * (data_left is not None)
    assert [shard["state"] for shard in status(run)["fuse"]["shards"]][:4] == [
        "done", "done", "done" if manifest_left else "unfinished", "pending"
    ]  # fmt: skip
    ptafuse("fuse", str(undisturbed.config), "--run", str(run), "--local")
    assert data_hashes(run) == data_hashes(undisturbed.run)
    assert len(files_of_victim(run)[1]) == attempts_after
    assert ptafuse("verify", str(run)).returncode == 0


def test_every_row_of_the_fault_table_names_its_test() -> None:
    rows = [line for line in (REPOSITORY / "docs" / "faults.md").read_text().splitlines() if line.startswith("| ")]
    rows = rows[2 : next(index for index, line in enumerate(rows) if line.startswith("| variable"))]
    sources = "\n".join(path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    assert len(rows) > 10
    for row in rows:
        names = re.findall(r"`(test_\w+)", row.rsplit("|", 2)[1])
        assert names, row
        assert all(f"def {name}(" in sources for name in names), row


# --- races ------------------------------------------------------------------------------------------------------------


def test_two_attempts_race(tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, found = race(tiny_config, str(tmp_path / "run"), monkeypatch)
    assert sorted(status.outcome for status in found) == ["already done", "done"]
    manifest = run.store.read_manifest(run.resolved.steps["shard"].folder, 0)
    assert manifest is not None
    folder = run.resolved.steps["shard"].folder
    assert [f"{folder}/data/{name}" for name in run.store.names(f"{folder}/data")] == [manifest.data.key]
    assert run.store.read_table(manifest.data, remake="").num_rows == manifest.num_rows_out


def test_inputs_of_different_versions_are_refused(
    tiny_config: Path, run_without_fuse: Path, undisturbed_run: Path
) -> None:
    """As where another attempt replaced a manifest after a later stage had read it."""
    run = run_without_fuse
    path = next(run.glob(f"logits/llama/*/manifests/shard-{VICTIM:05d}.json"))
    manifest = json.loads(path.read_text())
    other = json.loads((path.parent / "shard-00000.json").read_text())
    path.write_text(json.dumps({**manifest, "data": other["data"]}))
    refused = ptafuse("fuse", str(tiny_config), "--run", str(run), "--local", check=False)
    assert refused.returncode == 1
    assert re.search(
        r"align/neox/\w+ shard 2 was computed from another version of logits/llama/\w+ than", refused.stderr
    )
    path.write_text(json.dumps(manifest))
    ptafuse("retry", str(run))
    ptafuse("fuse", str(tiny_config), "--run", str(run), "--local")
    assert data_hashes(run) == data_hashes(undisturbed_run)


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Provide a file system of 512 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_disk_ends_the_command_and_costs_no_attempt(
    tiny_config: Path, undisturbed_run: Path, small_disk: Path
) -> None:
    run = small_disk / "run"
    ptafuse("shard", str(tiny_config), "--run", str(run), "--local")
    filler = small_disk / "filler"
    with filler.open("wb") as file, pytest.raises(OSError, match="No space left"):
        file.write(bytes(2**20))
    step = run / next(folder for folder in data_hashes(run) if folder.startswith("shard"))
    shutil.rmtree(step / "manifests")
    refused = ptafuse("shard", str(tiny_config), "--run", str(run), "--local", check=False)
    assert refused.returncode == 1
    assert "the disk is full: free some space" in refused.stderr
    assert not list(run.rglob("*.tmp"))
    filler.unlink()
    ptafuse("shard", str(tiny_config), "--run", str(run), "--local")
    expected = {folder: hashes for folder, hashes in data_hashes(undisturbed_run).items() if folder.startswith("shard")}
    assert data_hashes(run) == expected


def test_file_size_limit_ends_the_command_and_costs_no_attempt(
    stage_process: StageProcess, tiny_config: Path, undisturbed_run: Path, run_without_fuse: Path
) -> None:
    run = run_without_fuse
    sizes = sorted(path.stat().st_size for path in undisturbed_run.glob("fuse/*/data/*"))
    ended = stage_process(tiny_config, str(run), "fuse", file_size=sizes[-1] - 1)
    assert ended.code == 1
    assert re.search(r"data/shard-0000\d-of-00006\.\S+\.parquet: the file is larger", ended.stderr)
    assert "larger than this process may write: raise the limit (`ulimit -f`)" in ended.stderr
    assert all(shard["error"] is None for shard in status(run)["fuse"]["shards"])
    ptafuse("fuse", str(tiny_config), "--run", str(run), "--local")
    assert data_hashes(run) == data_hashes(undisturbed_run)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full: free some space"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the disk is mounted read-only: give a run directory that can be written"),
        (errno.EACCES, "permission denied: give a run directory that this user can write"),
        (errno.EIO, "the disk gave an input/output error"),
    ],
)
def test_disk_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StoreError, match=re.escape(f"{tmp_path}/run/m.json: {message}")):
        Store(str(tmp_path / "run")).create("m.json", b"{}")
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


# --- nodes ------------------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_node_dies_with_a_shard_on_it(
    tiny_config: Path, undisturbed_run: Path, run_without_fuse: Path, tmp_path: Path
) -> None:
    """The worker of shard 2 waits on the one node that has a CPU until that node is killed; another node joins."""
    run = run_without_fuse
    script = [sys.executable, "-m", "tests.faults.two_nodes", str(tiny_config), str(run), str(tmp_path)]
    env = environment(PTAFUSE_FAULT=f"block@compute:fuse:{VICTIM}:{tmp_path}")
    done = subprocess.run(script, check=False, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert (tmp_path / "node-killed").exists()
    assert data_hashes(run) == data_hashes(undisturbed_run)
    attempts = {shard["shard"]: shard["attempts"] for shard in status(run)["fuse"]["shards"]}
    assert attempts[VICTIM] == 2


@pytest.mark.ray
def test_storage_that_fails_under_ray_is_one_message(
    tiny_config: Path, undisturbed_run: Path, run_without_fuse: Path
) -> None:
    """Only the workers find out: the folder of attempts is read-only, the rest of the run directory is not."""
    run = run_without_fuse
    ptafuse("fuse", str(tiny_config), "--run", str(run), "--local")
    folder = next(run.glob("fuse/*"))
    shutil.rmtree(folder / "manifests")
    attempts = str(folder / "attempts")
    for mount in (["--bind", attempts, attempts], ["-o", "remount,ro,bind", attempts]):
        if subprocess.run(["mount", *mount], check=False, capture_output=True).returncode:
            pytest.skip("this user may not mount a folder read-only")
    try:
        ended = ptafuse_process("fuse", str(tiny_config), "--run", str(run), check=False)
    finally:
        subprocess.run(["umount", "-l", attempts], check=True)
    assert ended.returncode == 1
    message = ended.stderr.splitlines()[-1]
    assert message.startswith(f"ptafuse: {attempts}/shard-")
    assert "the disk is mounted read-only: give a run directory that can be written" in message
    assert "Traceback" not in ended.stderr
    ptafuse("fuse", str(tiny_config), "--run", str(run), "--local")
    assert data_hashes(run) == data_hashes(undisturbed_run)
