"""The run directory: nothing half-written is ever seen, and nothing is published twice."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from stages.contract import schemas
from stages.contract.columns import SparseRows, list_column, list_row, sparse_columns, sparse_row
from stages.contract.manifest import DataFile
from stages.contract.store import Store, StoreError


def shard_table(num_rows: int = 3) -> pa.Table:
    columns = {
        "doc_id": list(range(num_rows)),
        "segment": [0] * num_rows,
        "split": ["train"] * num_rows,
        "byte_start": [0] * num_rows,
        "is_last": [True] * num_rows,
        "text": ["é \U0001f600 text"] * num_rows,
    }
    return pa.table(columns, schema=schemas.SHARD)


def logits_table(gold: float = -1.0) -> pa.Table:
    rows = SparseRows(np.array([[3, 1], [2, -1]], np.int32), np.array([[-0.1, -3.0], [-0.5, -np.inf]], np.float32))
    ids, logprobs = sparse_columns([rows], pa.uint16())
    columns = [
        pa.array([0], pa.int64()),
        pa.array([0], pa.int32()),
        list_column([np.array([5, 6])], pa.uint16()),
        list_column([np.array([1, 4])], pa.int32()),
        list_column([np.array([gold, np.nan])], pa.float32()),
        ids,
        logprobs,
    ]
    return pa.table(columns, schema=schemas.logits_schema(400))


def test_table_is_read_back_as_written_and_named_by_its_hash(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "run"))
    data = store.write_table("shard/x/data/a.parquet", shard_table())
    assert store.read_table(data, remake="`make shard`").equals(shard_table())
    assert data.num_bytes == (tmp_path / "run/shard/x/data/a.parquet").stat().st_size
    assert store.write_table("shard/x/data/b.parquet", shard_table()).sha256 == data.sha256


def test_no_temporary_file_stays_behind(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_table("data/a.parquet", shard_table())
    store.create("m.json", b"{}")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a.parquet", "m.json"]


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_number_that_is_not_finite_is_refused_and_leaves_no_file(tmp_path: Path, bad: float) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(ValueError, match="gold_logprob holds 1 values that are not finite"):
        store.write_table("data/a.parquet", logits_table(gold=bad))
    assert not list(tmp_path.rglob("*.parquet*"))


def test_tampered_and_truncated_files_are_noticed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    data = store.write_table("data/a.parquet", shard_table())
    path = tmp_path / "data/a.parquet"
    whole = path.read_bytes()
    for broken in (whole[:-20], whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], b""):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"not the file that was committed.*verify.*--repair.*make shard"):
            store.read_table(data, remake="`make shard`")
    path.unlink()
    with pytest.raises(ValueError, match="is missing although its manifest names it"):
        store.read_table(data, remake="`make shard`")


def test_create_publishes_once(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert store.create("manifests/a.json", b"first")
    assert not store.create("manifests/a.json", b"second")
    assert store.read("manifests/a.json") == b"first"


def test_create_publishes_once_in_an_object_store() -> None:
    store = Store("memory://run-create")
    assert store.create("manifests/a.json", b"first")
    assert store.read("manifests/a.json") == b"first"
    data = store.write_table("data/a.parquet", shard_table())
    assert store.read_table(data, remake="").equals(shard_table())
    assert store.names("data") == ["a.parquet"]


@pytest.mark.parametrize("key", ["../outside", "/etc/passwd", "a/../../b", "s3://bucket/x"])
def test_key_that_leaves_the_run_directory_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="not a path inside the run directory"):
        Store(str(tmp_path)).path(key)


def test_home_of_a_file_is_found_though_another_one_cannot_be_asked(tmp_path: Path, monkeypatch) -> None:
    """A run directory that shares from two others, one of which is not to be reached any more."""
    store, other = Store(str(tmp_path / "run")), Store(str(tmp_path / "other"))
    for name, home in (("a", other.url), ("b", "memory://gone")):
        store.create(f"configs/{name}.json", json.dumps({"config": {"logits_from": home}}).encode())
    other.create("x.bin", b"shared")
    names = Store.names

    def names_unless_gone(self: Store, folder: str) -> list[str]:
        if self.url.startswith("memory:"):
            raise StoreError("no useful answer for 300 s")
        return names(self, folder)

    monkeypatch.setattr(Store, "names", names_unless_gone)
    assert store.read_file(DataFile(key="x.bin", sha256="", num_bytes=6, home=other.url)) == b"shared"
    with pytest.raises(StoreError, match="no useful answer"):
        store.read_file(DataFile(key="x.bin", sha256="", num_bytes=6, home=str(tmp_path / "third")))


def test_missing_folder_has_no_names(tmp_path: Path) -> None:
    assert Store(str(tmp_path / "nothing")).names("shard") == []


def test_sparse_columns_come_back_padded() -> None:
    table = logits_table()
    rows = sparse_row(table, 0)
    assert rows.ids.tolist() == [[3, 1], [2, -1]]
    assert rows.logprobs[1, 1] == -np.inf
    assert rows.present.tolist() == [True, True]
    assert np.isnan(list_row(table, "gold_logprob", 0)[1])


def test_read_only_folder_is_an_error_not_a_loss(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root writes anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        Store(str(tmp_path)).create("a.json", b"{}")


@pytest.mark.parametrize("url", ["local", "memory://run-files"])
def test_listing_shows_every_file_below_a_folder(tmp_path: Path, url: str) -> None:
    store = Store(str(tmp_path / "run") if url == "local" else url)
    keys = ["a/attempts/shard-00000/1.json", "a/attempts/shard-00000/2.json", "a/attempts/x.json"]
    for key in [*keys, "a/other/y.json"]:
        store.replace(key, key.encode())
    before = time.time()
    entries = store.files("a/attempts")
    assert [entry.key for entry in entries] == keys
    assert [entry.num_bytes for entry in entries] == [len(key) for key in keys]
    assert all(abs(entry.modified - before) < 60 for entry in entries if entry.modified is not None)
    assert store.files("nothing") == []
    store.replace(keys[0], b"other contents")
    after = store.files("a/attempts")
    assert after[0].version != entries[0].version
    assert after[1:] == entries[1:]


def test_listing_does_not_follow_links(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "run"))
    store.replace("a/one.json", b"1")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "two.json").write_text("2")
    (tmp_path / "run/a/link").symlink_to(tmp_path / "outside")
    assert [entry.key for entry in store.files("a")] == ["a/link", "a/one.json"]


@pytest.mark.parametrize("url", ["local", "memory://run-read-all"])
def test_many_files_are_read_in_order_and_missing_ones_left_out(tmp_path: Path, url: str) -> None:
    store = Store(str(tmp_path / "run") if url == "local" else url)
    keys = [f"a/{number}.json" for number in range(100)]
    for key in keys[::2]:
        store.replace(key, key.encode())
    assert list(store.read_all(keys)) == [(key, key.encode()) for key in keys[::2]]
