"""``logits_from``: a run reads finished shards and logits in another run directory and writes nothing there."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.run.resolve import resolve
from pipeline.run.steps import Request
from pipeline.settings.load import load_config
from stages.contract.store import Store
from tests.tiny_run import data_hashes, ptafuse, status

NUM_SHARDS = 6
pytestmark = pytest.mark.slow


@pytest.fixture
def other(undisturbed_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(undisturbed_run, tmp_path / "other", ignore=shutil.ignore_patterns("train", "eval")))


def files(run: Path) -> dict[str, tuple[int, int]]:
    found = {str(path.relative_to(run)): path.stat() for path in run.rglob("*") if path.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def fuse(config: Path, run: Path, other: Path, *more: str) -> str:
    shared = f"logits_from={other}"
    return ptafuse("fuse", str(config), "--run", str(run), "--local", "--upstream", "--set", shared, *more).stdout


def sharded(run: Path) -> dict[str, dict[int, str]]:
    return {folder: found for folder, found in data_hashes(run).items() if not folder.startswith(("train", "eval"))}


def test_finished_logits_are_read_where_they_are(tiny_config: Path, other: Path, tmp_path: Path) -> None:
    before, run = files(other), tmp_path / "run"
    shown = fuse(tiny_config, run, other)
    for key in ("shard", "logits/llama", "logits/neox"):
        assert f"{key}: {NUM_SHARDS} of {NUM_SHARDS} shards are read in {other}" in shown
        assert f"{key}: nothing to do" in shown
    assert sharded(run) == sharded(other), "aligned and fused rows are those of a run that computed everything"
    assert files(other) == before
    assert not list(run.glob("shard/*/data/*"))
    assert not list(run.glob("logits/*/*/data/*"))
    steps = status(run)
    assert all(steps[key]["is_done"] for key in ("shard", "logits/llama", "logits/neox", "align/neox", "fuse"))
    assert steps["logits/neox"]["health"] == status(other)["logits/neox"]["health"]
    assert "match their manifests; 0 shards" in ptafuse("verify", str(run)).stdout
    for stage in ("logits/neox", "align/neox", "fuse"):
        assert "token" in ptafuse("inspect", str(run), stage, "0", "--segment", "0", "--position", "3").stdout
    again = ptafuse("fuse", str(tiny_config), "--run", str(run), "--local", "--upstream").stdout
    assert again.count("nothing to do") == 5, "without logits_from the run knows where its logits are"


def test_what_is_not_done_there_is_computed_here(tiny_config: Path, other: Path, tmp_path: Path) -> None:
    complete = sharded(other)
    for manifest in sorted(other.glob("logits/neox/*/manifests/*.json"))[2:5]:
        manifest.unlink()
    shutil.rmtree(other / "logits" / "llama")
    run = tmp_path / "run"
    assert f"logits/neox: 3 of {NUM_SHARDS} shards are read in" in fuse(tiny_config, run, other)
    assert sharded(run) == complete
    assert len(list(run.glob("logits/neox/*/data/*"))) == 3
    assert len(list(run.glob("logits/llama/*/data/*"))) == NUM_SHARDS


def test_an_added_source_shares_the_others_and_computes_its_own(tiny_config: Path, other: Path, tmp_path: Path) -> None:
    toml = tmp_path / "more.toml"
    source = f'[[sources]]\nname = "gemma"\npath = "{tiny_config.parent}/gemma"\n\n[shard]'
    toml.write_text(tiny_config.read_text().replace("[shard]", source))
    run = tmp_path / "run"
    fuse(toml, run, other)
    computed = {path.parent.parent.parent.name for path in run.glob("logits/*/*/data/*")}
    assert computed == {"gemma"}
    assert not list(run.glob("shard/*/data/*"))


def test_a_model_may_have_another_name_there(tiny_config: Path, other: Path, tmp_path: Path) -> None:
    toml = tmp_path / "renamed.toml"
    toml.write_text(tiny_config.read_text().replace('name = "neox"', 'name = "pythia"'))
    run = tmp_path / "run"
    assert f"logits/pythia: {NUM_SHARDS} of {NUM_SHARDS} shards are read in" in fuse(toml, run, other)
    assert set(status(run)) >= {"logits/pythia", "align/pythia"}


def test_where_logits_are_read_changes_no_fingerprint(tiny_config: Path, other: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "run"))
    alone = resolve(load_config(tiny_config), store, Request("x"))
    shared = resolve(load_config(tiny_config, (f"logits_from={other}",)), store, Request("x"))
    assert {key: step.fingerprint for key, step in alone.steps.items()} == {
        key: step.fingerprint for key, step in shared.steps.items()
    }


def test_logits_of_other_rows_are_not_taken(tiny_config: Path, other: Path, tmp_path: Path) -> None:
    for path in other.glob("logits/neox/*/manifests/*.json"):
        manifest = json.loads(path.read_text())
        manifest["inputs"]["shard"]["data_sha256"] = "0" * 64
        path.write_text(json.dumps(manifest))
    run = tmp_path / "run"
    assert f"logits/neox: 0 of {NUM_SHARDS} shards are read in" in fuse(tiny_config, run, other)
    assert len(list(run.glob("logits/neox/*/data/*"))) == NUM_SHARDS


@pytest.mark.parametrize("damage", ["missing", "tampered"])
def test_a_file_that_is_damaged_there_is_noticed_here(
    tiny_config: Path, other: Path, tmp_path: Path, damage: str
) -> None:
    run = tmp_path / "run"
    fuse(tiny_config, run, other)
    shutil.rmtree(run / "align")
    victim = sorted(other.glob("logits/neox/*/data/*"))[0]
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    refused = ptafuse("align", str(tiny_config), "--run", str(run), "--local", check=False)
    assert refused.returncode == 1
    assert str(other) in refused.stderr
    assert victim.name in refused.stderr
    found = ptafuse("verify", str(run), check=False)
    assert found.returncode == 1
    assert victim.name in found.stdout


def test_a_home_that_no_configuration_names_is_refused_everywhere(
    tiny_config: Path, other: Path, undisturbed_run: Path, tmp_path: Path
) -> None:
    """As where someone writes into a manifest that its rows lie in another folder of this machine."""
    run = Path(shutil.copytree(undisturbed_run, tmp_path / "run", ignore=shutil.ignore_patterns("train", "eval")))
    for path in run.glob("logits/neox/*/manifests/*.json"):
        manifest = json.loads(path.read_text())
        manifest["data"]["home"] = str(other)
        path.write_text(json.dumps(manifest))
    shutil.rmtree(run / "fuse")
    rows = {name for name in files(run) if "/data/" in name}
    for arguments in (
        ("fuse", str(tiny_config), "--run", str(run), "--local"),
        ("inspect", str(run), "logits/neox", "0", "--segment", "0", "--position", "3"),
        ("verify", str(run)),
        ("gc", str(run)),
    ):
        refused = ptafuse(*arguments, check=False)
        assert refused.returncode == 1, arguments
        said = refused.stdout + refused.stderr
        assert f"is in {other}, which no configuration that ran here names as logits_from" in said, arguments
    assert {name for name in files(run) if "/data/" in name} == rows, "nothing was computed and nothing removed"
    assert "6 shards or models do not" in ptafuse("verify", str(run), check=False).stdout, (
        "the others are read all the same"
    )
    ptafuse("verify", str(run), "--repair", check=False)
    ptafuse("retry", str(run))
    ptafuse("fuse", str(tiny_config), "--run", str(run), "--local", "--upstream")
    assert sharded(run) == sharded(other)


def test_a_run_directory_shares_what_it_shares_itself(tiny_config: Path, other: Path, tmp_path: Path) -> None:
    """The third names the second alone, whose manifests name the first: that one is read."""
    second, third = tmp_path / "second", tmp_path / "third"
    fuse(tiny_config, second, other)
    fuse(tiny_config, third, second)
    assert not list(third.glob("logits/*/*/data/*"))
    assert json.loads(next(third.glob("logits/neox/*/manifests/*.json")).read_text())["data"]["home"] == str(other)
    assert ptafuse("verify", str(third)).returncode == 0


def test_a_place_without_logits_is_refused(tiny_config: Path, tmp_path: Path) -> None:
    refused = ptafuse(
        "shard", str(tiny_config), "--run", str(tmp_path / "run"), "--set", f"logits_from={tmp_path}", check=False
    )
    assert refused.returncode == 1
    assert f"make logits RUN={tmp_path}" in refused.stderr
    assert "remove logits_from" in refused.stderr


def test_a_removed_source_touches_nothing(tiny_config: Path, undisturbed_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(undisturbed_run, tmp_path / "run", ignore=shutil.ignore_patterns("train", "eval")))
    toml = tmp_path / "other.toml"
    toml.write_text(tiny_config.read_text().replace("neox", "gemma"))  # neox out, gemma in
    before = files(run)
    ptafuse("shard", str(toml), "--run", str(run), "--local")
    after = files(run)
    assert before.items() <= after.items()
