"""The whole pipeline with dataset and run directory on S3 servers, through a connection that fails again and again."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.run.records import recorded_run
from stages.contract.filesystem import retry_transient
from stages.contract.store import Store
from tests.s3.conftest import use
from tests.s3.proxy import Fault, FaultyProxy
from tests.s3.servers import BUCKET, SECRET, S3Server
from tests.tiny_run import data_hashes, ptafuse

pytestmark = [pytest.mark.s3, pytest.mark.slow]

RUN = f"s3://{BUCKET}/whole"
FAULTS: tuple[Fault, ...] = ("drop", "lose-answer", "slow-down", "error", "cut-upload", "cut-answer")
NUM_TO_STRIKE = 7
"""Every seventh request is struck, by each fault in turn."""


@dataclass(frozen=True)
class RemoteRun:
    toml: Path
    output: str
    num_struck: int

    def ptafuse(self, stage: str, *arguments: str, check: bool = True):
        return ptafuse(stage, str(self.toml), "--run", RUN, "--local", *arguments, check=check)


@pytest.fixture(scope="module")
def bad_connection(s3_server: S3Server) -> Iterator[FaultyProxy]:
    """Provide a proxy before the server, and this process's environment set for it."""
    count = [0]

    def choose(method: str, path: str) -> Fault | None:
        count[0] += 1
        return None if count[0] % NUM_TO_STRIKE else FAULTS[count[0] // NUM_TO_STRIKE % len(FAULTS)]

    with FaultyProxy(s3_server.port, choose) as proxy, pytest.MonkeyPatch.context() as patch:
        use(proxy.endpoint, patch)
        yield proxy


@pytest.fixture(scope="module")
def remote_run(bad_connection: FaultyProxy, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> RemoteRun:
    """A finished run whose dataset is in the object store too."""
    folder = tmp_path_factory.mktemp("remote")
    corpus = f"s3://{BUCKET}/corpus"
    Store(corpus).replace("corpus.jsonl", (tiny_config.parent / "corpus.jsonl").read_bytes())
    text = tiny_config.read_text().replace(f"{tiny_config.parent}/corpus.jsonl", f"{corpus}/corpus.jsonl")
    toml = folder / "remote.toml"
    toml.write_text(f'{text}scratch = "{folder}/scratch"\n')
    done = ptafuse("eval", str(toml), "--run", RUN, "--local", "--upstream")
    return RemoteRun(toml, done.stdout, len(bad_connection.struck))


def model_files(store: Store) -> dict[str, str]:
    folder = recorded_run(store).steps["train"].folder
    return json.loads(store.read(f"{folder}/manifest.json"))["model_files"]


def test_rows_and_model_are_those_of_an_undisturbed_local_run(
    remote_run: RemoteRun, bad_connection: FaultyProxy, undisturbed_run: Path
) -> None:
    store = Store(RUN)
    steps = [step for step in recorded_run(store).steps.values() if step.stage in ("shard", "logits", "align", "fuse")]
    found = {
        step.key: {shard: manifest.data.sha256 for shard, manifest in store.manifests(step.folder).items()}
        for step in steps
    }
    assert found == {folder.rpartition("/")[0]: hashes for folder, hashes in data_hashes(undisturbed_run).items()}
    assert model_files(store)["model.safetensors"] == model_files(Store(str(undisturbed_run)))["model.safetensors"]
    assert f"the model is at {RUN}/train/" in remote_run.output
    assert {fault for _, _, fault in bad_connection.struck} == set(FAULTS)
    assert remote_run.num_struck > 30


def test_commands_read_the_remote_run(remote_run: RemoteRun) -> None:
    assert ptafuse("verify", RUN).returncode == 0
    assert "everything is done" in ptafuse("status", RUN).stdout
    assert "bits per byte" in ptafuse("report", RUN).stdout
    assert remote_run.ptafuse("eval", "--upstream").stdout.count("nothing to do") == 7


def test_no_secret_is_written(remote_run: RemoteRun) -> None:
    filesystem = Store(RUN)._fs
    files = retry_transient(filesystem.find, RUN, url=RUN)
    assert len(files) > 50
    assert all(SECRET.encode() not in retry_transient(filesystem.cat_file, path, url=RUN) for path in files)
    assert SECRET not in remote_run.output


def test_other_machine_evaluates_the_model_that_it_fetches(remote_run: RemoteRun, tmp_path: Path) -> None:
    store = Store(RUN)
    figure = f"{recorded_run(store).steps['eval/fused'].folder}/bits-per-byte.json"
    expected = json.loads(store.read(figure))["bits_per_byte"]
    for damage in (None, b"damaged"):
        if damage:
            next(tmp_path.glob("*/train/*/model/model.safetensors")).write_bytes(damage)
        store.delete(figure)
        remote_run.ptafuse("eval", "--set", f"engine.scratch={tmp_path}")
        assert json.loads(store.read(figure))["bits_per_byte"] == expected


def test_killed_upload_of_the_model_is_repeated_without_training_again(
    remote_run: RemoteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(RUN)
    expected = model_files(store)
    store.delete(f"{recorded_run(store).steps['train'].folder}/manifest.json")

    def killed(self: Store, key: str, file: Path) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "upload", killed)
        assert remote_run.ptafuse("train", check=False).returncode == 1
    assert "train: step" not in remote_run.ptafuse("train").stdout
    assert model_files(store) == expected


def test_training_of_a_lost_machine_resumes_from_the_copied_checkpoint(remote_run: RemoteRun, tmp_path: Path) -> None:
    """Another machine has an empty scratch folder; the copy of the last step is taken away, so one step is left."""
    store = Store(RUN)
    expected, folder = model_files(store), recorded_run(store).steps["train"].folder
    copies = [name for name in store.names(folder) if name.startswith("checkpoint-")]
    assert len(copies) == 2, "as many as keep_checkpoints"
    store.delete(f"{folder}/manifest.json")
    for entry in store.files(f"{folder}/{copies[1]}"):
        store.delete(entry.key)
    shown = remote_run.ptafuse("train", "--set", f"engine.scratch={tmp_path}").stdout
    assert f"train: fetched the checkpoint of step {int(copies[0].removeprefix('checkpoint-'))} from {RUN}" in shown
    assert shown.count("train: step ") == 1
    assert model_files(store) == expected
    assert [name for name in store.names(folder) if name.startswith("checkpoint-")] == copies


@pytest.mark.parametrize("place", ["store", "disk"])
def test_logits_are_shared_from_an_object_store(remote_run: RemoteRun, tmp_path: Path, place: str) -> None:
    run = f"s3://{BUCKET}/sharing" if place == "store" else str(tmp_path / "run")
    arguments = (str(remote_run.toml), "--run", run, "--local", "--upstream", "--set", f"logits_from={RUN}")
    shown = ptafuse("fuse", *arguments).stdout
    assert f"logits/neox: 6 of 6 shards are read in {RUN}" in shown
    store, other = Store(run), Store(RUN)
    assert not [entry.key for name in ("shard", "logits") for entry in store.files(name) if "/data/" in entry.key]
    for step in recorded_run(store).of_stage("fuse"):
        assert {shard: manifest.data.sha256 for shard, manifest in store.manifests(step.folder).items()} == {
            shard: manifest.data.sha256 for shard, manifest in other.manifests(step.folder).items()
        }
    assert ptafuse("verify", run).returncode == 0
