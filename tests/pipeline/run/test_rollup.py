"""Rollups: figures read from them are those of the manifests, whatever happens to either."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.run import rollup
from pipeline.run.rollup import FiguresReader, StepFigures, read_rollups, roll_up
from pipeline.run.steps import ResolvedRun
from stages.contract.manifest import Manifest, Mean, manifest_key
from stages.contract.store import Store
from tests.synthetic_run import fill, manifest_of, synthetic_run

NUM_SHARDS = 12
KEY = "align/neox"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollups of a handful of shards."""
    monkeypatch.setattr(rollup, "MIN_SHARDS_TO_ROLL_UP", 2)


@pytest.fixture
def run(tiny_config: Path, tmp_path: Path) -> tuple[ResolvedRun, Store]:
    store = Store(str(tmp_path / "run"))
    found = synthetic_run(tiny_config, store, NUM_SHARDS)
    fill(found, tmp_path / "run", {KEY: NUM_SHARDS - 2})
    return found, store


def expected(store: Store, folder: str) -> tuple[dict, dict]:
    """Tokens of each shard, and health, straight from the manifests."""
    manifests = store.manifests(folder)
    health: dict = {}
    for manifest in manifests.values():
        for name, figure in manifest.health.items():
            health[name] = health[name] + figure if name in health else figure
    return {shard: (manifest.data.key, manifest.seconds) for shard, manifest in manifests.items()}, health


def found(figures: StepFigures) -> tuple[dict, dict]:
    return {shard: (done.data_key, done.seconds) for shard, done in figures.shards.items()}, figures.health


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The manifests that are read from here on."""
    seen: list[str] = []
    read_all = Store.read_all

    def counted(self, keys):
        seen.extend(key for key in keys if "/manifests/" in key)
        return read_all(self, keys)

    monkeypatch.setattr(Store, "read_all", counted)
    return seen


@pytest.mark.usefixtures("few")
def test_figures_from_rollups_are_those_of_the_manifests(
    run: tuple[ResolvedRun, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved, store = run
    folder = resolved.steps[KEY].folder
    assert found(FiguresReader(store).read(folder)) == expected(store, folder)
    roll_up(store, folder)
    assert len(read_rollups(store, folder)) == NUM_SHARDS - 2
    seen = reads(monkeypatch)
    figures = FiguresReader(store).read(folder)
    assert seen == []
    assert found(figures) == expected(store, folder)
    assert list(figures.shards) == sorted(figures.shards)


@pytest.mark.usefixtures("few")
def test_shard_made_again_or_taken_back_is_read_from_its_manifest(run: tuple[ResolvedRun, Store]) -> None:
    resolved, store = run
    folder = resolved.steps[KEY].folder
    roll_up(store, folder)
    reader = FiguresReader(store)
    reader.read(folder)
    store.delete(manifest_key(folder, 3))
    path = Path(store.path(manifest_key(folder, 4)))
    changed = json.loads(path.read_text())
    changed["num_tokens"] = 7
    path.write_text(json.dumps(changed))
    for one in (reader, FiguresReader(store)):
        figures = one.read(folder)
        assert 3 not in figures.shards
        assert figures.shards[4].num_tokens == 7
        assert found(figures) == expected(store, folder)


def test_reader_reads_only_what_is_new(run: tuple[ResolvedRun, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    resolved, store = run
    folder = resolved.steps[KEY].folder
    reader = FiguresReader(store)
    reader.read(folder)
    store.create(manifest_key(folder, 11), manifest_of(resolved, KEY, 11, NUM_SHARDS).to_bytes())
    seen = reads(monkeypatch)
    assert 11 in reader.read(folder).shards
    assert seen == [manifest_key(folder, 11)]
    assert found(reader.read(folder)) == expected(store, folder)


@pytest.mark.usefixtures("few")
def test_rollup_holds_what_is_in_no_other_one(run: tuple[ResolvedRun, Store], tmp_path: Path) -> None:
    resolved, store = run
    folder = resolved.steps[KEY].folder
    roll_up(store, folder)
    roll_up(store, folder)
    assert [name[:5] for name in store.names(f"{folder}/rollups")] == ["00010"]
    fill(resolved, tmp_path / "run", {KEY: 0})
    for shard in (10, 11):
        store.create(manifest_key(folder, shard), manifest_of(resolved, KEY, shard, NUM_SHARDS).to_bytes())
    roll_up(store, folder)
    assert [name[:5] for name in store.names(f"{folder}/rollups")] == ["00002", "00010"]


@pytest.mark.usefixtures("few")
def test_many_rollups_become_one(run: tuple[ResolvedRun, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    resolved, store = run
    folder = resolved.steps[KEY].folder
    roll_up(store, folder)
    for shard in (10, 11):
        store.create(manifest_key(folder, shard), manifest_of(resolved, KEY, shard, NUM_SHARDS).to_bytes())
    monkeypatch.setattr(rollup, "MAX_ROLLUPS_PER_STEP", 1)
    roll_up(store, folder)
    assert [name[:5] for name in store.names(f"{folder}/rollups")] == ["00012"]
    assert found(FiguresReader(store).read(folder)) == expected(store, folder)


def test_few_shards_get_no_rollup(run: tuple[ResolvedRun, Store]) -> None:
    resolved, store = run
    roll_up(store, resolved.steps[KEY].folder)
    assert store.names(f"{resolved.steps[KEY].folder}/rollups") == []


@pytest.mark.usefixtures("few")
def test_rollup_of_another_version_is_not_read(run: tuple[ResolvedRun, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    resolved, store = run
    folder = resolved.steps[KEY].folder
    roll_up(store, folder)
    monkeypatch.setattr(rollup, "ROLLUP_VERSION", 2)
    assert read_rollups(store, folder) == {}
    assert found(FiguresReader(store).read(folder)) == expected(store, folder)


@pytest.mark.usefixtures("few")
def test_a_refusing_store_costs_only_the_rollup(
    run: tuple[ResolvedRun, Store], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self, key, raw):
        raise OSError(28, "No space left on device")

    resolved, store = run
    monkeypatch.setattr(Store, "replace", refuse)
    roll_up(store, resolved.steps[KEY].folder)
    assert "no rollup was written" in caplog.text
    assert "No space left" in caplog.text


def test_rollups_work_in_an_object_store(run: tuple[ResolvedRun, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollup, "MIN_SHARDS_TO_ROLL_UP", 2)
    resolved, local = run
    folder = resolved.steps[KEY].folder
    store = Store("memory://rollup-run")
    for entry in local.files(f"{folder}/manifests"):
        store.replace(entry.key, local.read(entry.key))
    before = found(FiguresReader(store).read(folder))
    assert before == expected(local, folder)
    roll_up(store, folder)
    seen = reads(monkeypatch)
    assert found(FiguresReader(store).read(folder)) == before
    assert seen == []


def test_means_without_counts_add_up(run: tuple[ResolvedRun, Store]) -> None:
    resolved, store = run
    folder = resolved.steps["fuse"].folder
    plain = manifest_of(resolved, "fuse", 0, NUM_SHARDS)
    for shard, health in enumerate(
        ({"nll": Mean(total=0.0, count=0), "n": 1}, {"n": 2}, {"nll": Mean(total=3.0, count=2)})
    ):
        manifest = Manifest.model_validate({**plain.model_dump(), "shard": shard, "health": health})
        store.create(manifest_key(folder, shard), manifest.to_bytes())
    assert FiguresReader(store).read(folder).health == {"nll": Mean(total=3.0, count=2), "n": 3}


def test_time_of_the_manifest_is_when_the_shard_was_done(run: tuple[ResolvedRun, Store]) -> None:
    resolved, store = run
    folder = resolved.steps[KEY].folder
    os.utime(store.path(manifest_key(folder, 0)), (1e9, 1e9))
    done = FiguresReader(store).read(folder).shards
    assert done[0].finished == 1e9
    assert replace(done[1], finished=None).finished is None
