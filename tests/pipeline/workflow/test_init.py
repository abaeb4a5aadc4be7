"""``ptafuse init`` writes a configuration that loads once it is filled in; ``ptafuse run`` goes on to the evaluation."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from pipeline.settings.load import ConfigError, load_config
from pipeline.workflow.init import write_template
from tests.tiny_run import NUM_DOCUMENTS, data_hashes, documents, ptafuse


def filled_in(path: Path, folder: Path) -> str:
    """Return the text of a written file with the paths of a corpus and two models."""
    values = iter((f"{folder}/corpus.jsonl", f"{folder}/llama", f"{folder}/neox"))
    return re.sub('FILL IN(?="\n|"  #)', lambda _: next(values), path.read_text())


def test_what_init_writes_loads_once_it_is_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "My first run.toml"
    shown = ptafuse("init", str(path)).stdout
    lines = path.read_text().splitlines()
    places = re.findall(r"([a-z.]+) \(line (\d+)\)", shown)
    assert [key for key, _ in places] == ["dataset.path", "target.path", "sources.path"]
    assert all(lines[int(number) - 1].startswith('path = "FILL IN"') for _, number in places)
    assert f"`ptafuse plan {path}`" in shown
    with pytest.raises(
        ConfigError, match=r"fill in dataset\.path, target\.path, sources\.0\.path, which `ptafuse init` left"
    ):
        load_config(path)
    path.write_text(filled_in(path, tmp_path))
    config = load_config(path)
    assert config.name == "My-first-run"
    assert (config.dataset.path, [model.name for model in config.models]) == (
        f"{tmp_path}/corpus.jsonl",
        ["target", "source"],
    )


def test_every_further_setting_that_init_names_loads(tmp_path: Path) -> None:
    """Also data sets and models of the hub, in the place of a path."""
    path = tmp_path / "x.toml"
    write_template(path)
    text = filled_in(path, tmp_path)
    found = re.findall(r"^# ((?!.*`)[a-z_]+ = .*)$", text, flags=re.MULTILINE)
    assert len(found) > 10
    for setting in found:
        changed = text.replace(f"# {setting}", setting)
        tomllib.loads(changed)
        if setting.startswith(("hub", "revision")):
            continue
        path.write_text(changed)
        assert load_config(path) != load_config_of(tmp_path, text), setting
    for section in ("dataset", "target"):
        own = text.partition(f"[{section}]")[2].partition("\n[")[0]
        with_hub = re.sub(r"^path = .*$", "", own, count=1, flags=re.MULTILINE)
        with_hub = re.sub(r"^# (hub|revision) = ", r"\1 = ", with_hub, flags=re.MULTILINE)
        loaded = getattr(load_config_of(tmp_path, text.replace(own, with_hub)), section)
        assert (loaded.path, loaded.revision) == (None, "main")
        assert "/" in loaded.hub


def load_config_of(folder: Path, text: str):
    path = folder / "other.toml"
    path.write_text(text.replace('name = "other"', 'name = "x"'))
    return load_config(path)


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("mine")
    refused = ptafuse("init", str(path), check=False)
    assert refused.returncode == 1
    assert f"{path} already exists and is not overwritten" in refused.stderr
    assert path.read_text() == "mine"
    refused = ptafuse("init", str(tmp_path / "missing" / "x.toml"), check=False)
    assert "x.toml cannot be written (No such file or directory): give a file in an existing folder" in refused.stderr


@pytest.fixture
def own_run(tiny_config: Path, tmp_path: Path) -> Path:
    """Provide a file of init's, filled in with tiny models and made small."""
    path = tmp_path / "own.toml"
    write_template(path)
    text = filled_in(path, tiny_config.parent).replace("1024", "64").replace("batch_size = 32", "batch_size = 4")
    path.write_text(
        text.replace("validation_fraction = 0.05", "validation_fraction = 0.25").replace(
            "64  # tokens of a b", "64  # "
        )
    )
    return path


@pytest.mark.slow
def test_run_goes_from_a_file_of_inits_to_the_evaluation_and_passes_over_what_is_done(
    own_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = (
        "run",
        str(own_run),
        "--run",
        str(run),
        "--local",
        "--set",
        "logits.top_k=12",
        "--set",
        "train.device=cpu",
    )
    shown = ptafuse(*arguments).stdout
    assert re.search(r"eval/fused: [\d.]+ bits per byte", shown)
    assert f"everything is done; to see the tables: ptafuse report {run}" in shown
    assert json.loads(next(run.glob("configs/own-*.json")).read_text())["config"]["logits"]["top_k"] == 12
    hashes = data_hashes(run)
    again = ptafuse(*arguments).stdout
    assert "shard: nothing to do" in again
    assert "eval: nothing to do" in again
    assert data_hashes(run) == hashes
    for manifest in list(run.glob("align/source/*/manifests/*"))[:1]:
        manifest.unlink()
    ptafuse(*arguments)
    assert data_hashes(run) == hashes


def test_run_refuses_before_any_model_runs_where_nothing_is_held_out(own_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert len(documents()) == NUM_DOCUMENTS
    arguments = (str(own_run), "--run", str(run), "--local", "--set", "shard.validation_fraction=0.0")
    for command in (("run",), ("eval", "--upstream")):
        refused = ptafuse(*command, *arguments, check=False)
        assert refused.returncode == 1
        assert (
            "no document is held out, so nothing could be evaluated after training: raise shard.validation_fr"
            in refused.stderr
        )
    assert not (run / "logits").exists()
