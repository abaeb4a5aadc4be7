"""Fused files in an object store: who reads how much of them, and that each byte is the one its manifest names."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from stages.contract.store import Store
from tests.train.fused_files import fused_table, save, text_blocks
from train.data import files as files_module
from train.data.blocks import FusedBlocks, columns_read
from train.data.files import column_ranges, largest_value, merged, survey
from train.job import FusedFile

V = 50
ROWS = 3
"""Blocks in a row group."""


class CountingFilesystem:
    """An fsspec filesystem that counts the bytes it is asked for."""

    def __init__(self, filesystem: Any, read: list[tuple[str, int]]) -> None:
        self._filesystem = filesystem
        self._read = read

    def get_file(self, key: str, path: str) -> None:
        self._filesystem.get_file(key, path)
        self._read.append((key, Path(path).stat().st_size))

    def cat_file(self, key: str, *, start: int, end: int) -> bytes:
        raw = self._filesystem.cat_file(key, start=start, end=end)
        self._read.append((key, len(raw)))
        return raw


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """File and bytes of each request."""
    requests: list[tuple[str, int]] = []
    opened = files_module.open_filesystem

    def counting(url: str) -> tuple[Any, str]:
        filesystem, key = opened(url)
        return CountingFilesystem(filesystem, requests), key

    monkeypatch.setattr(files_module, "open_filesystem", counting)
    monkeypatch.setattr(files_module, "FREE_BYTES", 0)
    return requests


@pytest.fixture
def ids() -> list[np.ndarray]:
    return text_blocks(np.arange(3, 40), 64, 24)


@pytest.fixture
def here(tmp_path: Path, ids: list[np.ndarray]) -> list[FusedFile]:
    """Two files of four row groups each, on disk."""
    return [
        save(fused_table(part, V, tail="bucket", seed=seed), tmp_path / f"{seed}.parquet", row_group_size=ROWS)
        for seed, part in enumerate((ids[:12], ids[12:]))
    ]


@pytest.fixture
def remote(tmp_path: Path, here: list[FusedFile]) -> list[FusedFile]:
    """Provide the same in an object store."""
    store = Store(f"memory:/{tmp_path}")
    for file in here:
        store.upload(Path(file.path).name, Path(file.path))
    return [FusedFile(store.full_url(Path(file.path).name), file.sha256) for file in here]


def survey_all(files: Sequence[FusedFile], scratch: Sequence[Path], *, with_distributions: bool = True):
    """What workers find together, each on a machine of its own or on the same."""
    columns = partial(columns_read, with_distributions=with_distributions)
    size = len(scratch)
    return merged(survey(files, columns, share=(rank, size), scratch=folder) for rank, folder in enumerate(scratch))


def open_blocks(files: Sequence[FusedFile], facts, scratch: Path, *, with_distributions: bool = True) -> FusedBlocks:
    return FusedBlocks(
        files, prefix_id=None, eos_id=None, with_distributions=with_distributions, facts=facts, scratch=scratch
    )


def assert_same_block(one: FusedBlocks, other: FusedBlocks, index: int) -> None:
    found, expected = one.block(index), other.block(index)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.fused.ids, expected.fused.ids)
    np.testing.assert_array_equal(found.fused.logprobs, expected.fused.logprobs)
    np.testing.assert_array_equal(found.tail_mass, expected.tail_mass)


def test_a_worker_downloads_its_share_and_the_row_groups_that_it_reads(tmp_path, here, remote, read):
    folders = [tmp_path / "node-0", tmp_path / "node-1"]
    facts = survey_all(remote, folders)
    sizes = [Path(file.path).stat().st_size for file in here]
    assert [num_bytes for _, num_bytes in read] == sizes, "each file once, by one of the workers"
    read.clear()
    blocks, expected = open_blocks(remote, facts, folders[0]), open_blocks(here, None, folders[0])
    assert len(blocks) == len(expected) == 24
    assert blocks.max_tokens == expected.max_tokens == 64
    assert blocks.largest_id() == expected.largest_id()
    assert_same_block(blocks, expected, 4)
    assert read == [], "the first file is on the first worker's machine"
    assert_same_block(blocks, expected, 12 + 4)
    ranges = column_ranges(facts[1].metadata, 1, columns_read(pq.read_schema(here[1].path), with_distributions=True))
    assert sum(num_bytes for _, num_bytes in read) == sum(end - start for start, end in ranges)
    assert sum(num_bytes for _, num_bytes in read) < sizes[1] / 3, "one of four row groups"
    assert {Path(key).name for key, _ in read} == {"1.parquet"}


def test_workers_of_a_machine_share_what_they_fetched(tmp_path, remote, here, read):
    folders = [tmp_path / "node-0", tmp_path / "node-0", tmp_path / "node-1"]
    facts = survey_all(remote, folders)
    read.clear()
    first, second = (open_blocks(remote, facts, tmp_path / "node-2") for _ in range(2))
    first.prepare(range(24))
    fetched = len(read)
    assert fetched == 8, "one request for each row group"
    expected = open_blocks(here, None, tmp_path)
    for index in range(24):
        assert_same_block(second, expected, index)
    assert len(read) == fetched
    read.clear()
    survey_all(remote, folders)
    assert read == [], "a job that is started again finds its share on the disk"


def test_only_the_columns_that_are_read_are_downloaded(tmp_path, here, remote, read, monkeypatch):
    monkeypatch.setattr(files_module, "SMALLEST_GAP", 0)
    downloaded = []
    for with_distributions in (True, False):
        facts = survey_all(remote, [tmp_path / "a", tmp_path / "b"], with_distributions=with_distributions)
        folder = tmp_path / f"reader-{with_distributions}"
        blocks = open_blocks(remote, facts, folder, with_distributions=with_distributions)
        read.clear()
        np.testing.assert_array_equal(blocks.block(0).ids, open_blocks(here, None, folder).block(0).ids)
        downloaded.append(sum(num_bytes for _, num_bytes in read))
    assert downloaded[1] < downloaded[0] / 2


@pytest.mark.parametrize("damaged", ["part", "whole"])
def test_what_is_damaged_on_the_disk_is_fetched_again(tmp_path, here, remote, damaged, caplog, read):
    scratch = tmp_path / "node"
    facts = survey_all(remote, [tmp_path / "other" if damaged == "part" else scratch])
    open_blocks(remote, facts, scratch).block(0)
    (path,) = (
        scratch.glob(f"{here[0].sha256}-*.part") if damaged == "part" else scratch.glob(f"{here[0].sha256}.parquet")
    )
    path.write_bytes(bytes(path.stat().st_size))
    assert_same_block(open_blocks(remote, facts, scratch), open_blocks(here, None, scratch), 0)
    assert "is damaged (a power cut?)" in caplog.text


def test_a_file_that_changed_after_it_was_checked_is_refused(tmp_path, remote, ids):
    facts = survey_all(remote, [tmp_path / "other"])
    other = save(fused_table(ids[:12], V, tail="bucket", seed=7), tmp_path / "other.parquet", row_group_size=ROWS)
    folder, name = remote[0].path.rsplit("/", 1)
    Store(folder).upload(name, Path(other.path))
    blocks = open_blocks(remote, facts, tmp_path / "node")
    with pytest.raises(
        ValueError, match=r"row group 0 of .*0\.parquet differs from what was verified when training began"
    ):
        blocks.block(0)
    with pytest.raises(ValueError, match=r"its manifest says .* verify RUN --repair`, then `make fuse`"):
        survey_all(remote, [tmp_path / "new"])
    Store(folder).delete(name)
    with pytest.raises(ValueError, match="was removed during training"):
        blocks.block(0)
    with pytest.raises(ValueError, match="is missing"):
        survey_all(remote, [tmp_path / "new"])
    assert not list((tmp_path / "new").iterdir()), "nothing half fetched stays"


def test_nothing_is_kept_where_the_disk_is_nearly_full(tmp_path, here, remote, read, monkeypatch):
    monkeypatch.setattr(files_module, "FREE_BYTES", 2**62)
    scratch = tmp_path / "node"
    facts = survey_all(remote, [scratch])
    blocks = open_blocks(remote, facts, scratch)
    blocks.prepare(range(24))
    assert_same_block(blocks, open_blocks(here, None, scratch), 20)
    assert not list(scratch.iterdir())


def test_the_largest_id_is_known_from_the_statistics_or_else_from_the_rows(tmp_path, ids):
    table = fused_table(ids, V)
    with_statistics = save(table, tmp_path / "a.parquet")
    pq.write_table(table, tmp_path / "b.parquet", write_statistics=False)
    assert largest_value(pq.read_metadata(tmp_path / "a.parquet"), "token_ids") == max(map(np.max, ids))
    assert largest_value(pq.read_metadata(tmp_path / "b.parquet"), "token_ids") is None
    from hashlib import sha256

    without = FusedFile(str(tmp_path / "b.parquet"), sha256((tmp_path / "b.parquet").read_bytes()).hexdigest())
    found = [open_blocks([file], None, tmp_path).largest_id() for file in (with_statistics, without)]
    assert found[0] == found[1]
