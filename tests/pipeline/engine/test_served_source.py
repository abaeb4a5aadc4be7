"""A run whose source is on a server: the same rows, no weights of it here, and no evaluation of it."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.run.stage_table import stage_spec
from pipeline.settings.load import ConfigError, load_config
from tests.stages.logits.backends.completions_server import CompletionsServer, serving
from tests.tiny_run import ptafuse, save_inputs

SERVED = "sources.neox.backend=server"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inputs(tmp_path_factory.mktemp("inputs"))


def logits_rows(run: Path) -> list[dict]:
    return [row for file in sorted(run.glob("logits/neox/*/data/*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_a_served_source_is_fused_and_not_evaluated(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, served = tmp_path / "here", tmp_path / "served"
    ptafuse("logits", str(inputs), "--run", str(here), "--upstream", "--local")
    server = CompletionsServer(inputs.parent / "neox")
    (inputs.parent / "neox" / "model.safetensors").unlink()
    with serving(server) as url:
        monkeypatch.setenv("PTAFUSE_SERVER_URL", url)
        monkeypatch.setenv("PTAFUSE_SERVER_KEY", "very-secret")
        arguments = ("--run", str(served), "--local", "--set", SERVED)
        ptafuse("eval", str(inputs), *arguments, "--upstream")
    expected, found = logits_rows(here), logits_rows(served)
    assert [row["topk_ids"] for row in found] == [row["topk_ids"] for row in expected]
    assert sorted(folder.name for folder in (served / "eval").iterdir()) == ["fused", "llama"]
    shown = ptafuse("report", str(served)).stdout
    assert "target llama before" in shown
    assert "source neox" not in shown
    recorded = [file for file in served.rglob("*.json*") if "very-secret" in file.read_text(encoding="utf-8")]
    assert recorded == []


def test_a_served_source_asks_for_no_gpu(inputs: Path) -> None:
    config = load_config(inputs, (SERVED, "logits.device=auto", "logits.num_workers=3"))
    resources = stage_spec("logits").resources(config, "neox")
    assert (resources.num_workers, resources.gpus) == (3, 0)
    assert stage_spec("logits").resources(config, "llama").gpus is None


def test_the_backend_of_a_source_changes_only_the_fingerprint_of_its_logits(inputs: Path) -> None:
    plain, served = load_config(inputs), load_config(inputs, (SERVED, "sources.neox.served_model=x"))
    settings = stage_spec("logits").settings
    assert settings(plain, "llama") == settings(served, "llama")
    assert settings(plain, "neox") != settings(served, "neox")
    renamed = load_config(inputs, (SERVED, "sources.neox.served_model=y"))
    assert settings(served, "neox") == settings(renamed, "neox")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("baselines.ensemble=true", "the baselines run every model, and source neox has backend = 'server'"),
        ("sources.neox.adapt.num_epochs=1", "`adapt` trains a source, and backend = 'server' never loads its weights"),
    ],
)
def test_what_needs_the_weights_of_a_served_source_is_refused(inputs: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(inputs, (SERVED, override))
