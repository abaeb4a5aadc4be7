"""What a command imports: one that computes with no model starts without torch and transformers, which take seconds."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.engine import sharded_stage
from pipeline.run.session import open_run
from pipeline.run.steps import Request
from stages.models import token_tables
from stages.models.config import ModelConfig
from stages.models.tokenizer import SegmentTokenizer
from tests.tiny_run import REPOSITORY, data_hashes, environment, ptafuse

pytestmark = pytest.mark.slow

HEAVY = ("torch", "transformers", "tokenizers", "datasets", "ray", "tensorboard", "matplotlib")
_PROGRAM = f"""
import sys
from pipeline.cli.main import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print("imported:", *(name for name in {HEAVY} if name in sys.modules))
"""


@pytest.fixture(scope="module", autouse=True)
def _examined(tiny_config: Path, undisturbed_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The models were examined before, and no other process changes what is remembered of that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        ptafuse("plan", str(tiny_config), "--run", str(undisturbed_run))
        yield


@pytest.fixture
def run(undisturbed_run: Path, tmp_path: Path) -> Path:
    """Provide a finished run, to be changed."""
    return Path(shutil.copytree(undisturbed_run, tmp_path / "run"))


def imported(*arguments: str) -> list[str]:
    """The heavy libraries that a command has imported at its end, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments],
        check=False,
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize("stage", ["align", "fuse"])
def test_align_and_fuse_import_no_model_library(
    tiny_config: Path, undisturbed_run: Path, run: Path, stage: str
) -> None:
    shutil.rmtree(run / stage)
    assert not imported(stage, str(tiny_config), "--run", str(run), "--local")
    assert data_hashes(run) == data_hashes(undisturbed_run)


def test_fit_imports_no_model_library(tiny_config: Path, run: Path) -> None:
    fitted = ("--set", "fuse.function=fitted", "--set", "fuse.granularity=token")
    assert not imported("fit", str(tiny_config), "--run", str(run), "--local", *fitted)


def test_commands_that_read_import_no_model_library(tiny_config: Path, run: Path) -> None:
    assert not imported("status", str(run))
    assert not imported("plan", str(tiny_config), "--run", str(run))
    assert not imported("verify", str(run))
    assert not imported("report", str(run))
    for stage in ("shard", "logits/neox", "align/neox", "fuse"):
        position = () if stage == "shard" else ("--position", "3")
        assert not imported("inspect", str(run), stage, "0", "--segment", "0", *position)


def test_a_run_without_token_tables_loads_its_tokenizers_once(
    tiny_config: Path, undisturbed_run: Path, run: Path
) -> None:
    """As in a run directory of an earlier version."""
    tables = {file.relative_to(run): file.read_bytes() for file in (run / "tokenizers").rglob("*.parquet")}
    assert {file.name for file in tables} > {"tokens.parquet", "source-cut.parquet", "prefix.parquet"}
    for folder in ("align", "tokenizers"):
        shutil.rmtree(run / folder)
    assert "transformers" in imported("align", str(tiny_config), "--run", str(run), "--local")
    assert data_hashes(run) == data_hashes(undisturbed_run)
    assert {file.relative_to(run): file.read_bytes() for file in (run / "tokenizers").rglob("*.parquet")} == tables
    shutil.rmtree(run / "align")
    assert not imported("align", str(tiny_config), "--run", str(run), "--local")


def test_a_tokenizer_with_a_table_is_not_loaded_to_be_checked(
    tiny_config: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: ModelConfig) -> None:
        raise ValueError(f"the tokenizer of {model.name} was loaded")

    opened = open_run(Request(str(tiny_config), ()), str(run), Console(quiet=True), local=True)
    step = opened.resolved.steps["logits/llama"]
    monkeypatch.setattr(SegmentTokenizer, "load", fail)
    token_tables._LOADED.clear()
    sharded_stage._check_tokenizers(opened, step)
    shutil.rmtree(run / "tokenizers")
    token_tables._LOADED.clear()
    with pytest.raises(ValueError, match="the tokenizer of llama was loaded"):
        sharded_stage._check_tokenizers(opened, step)


def test_verify_repairs_and_gc_removes_bad_token_tables(run: Path) -> None:
    assert "token tables and maps are intact; 0 are not" in ptafuse("verify", str(run)).stdout
    tables = sorted((run / "tokenizers").rglob("*.parquet"))
    for file in tables[:2]:
        file.write_bytes(file.read_bytes()[:-20])
    shown = ptafuse("verify", str(run), check=False)
    assert shown.returncode == 1
    assert "; 2 are not" in shown.stdout
    assert str(tables[0].relative_to(run)) in shown.stdout
    assert "would remove" in ptafuse("gc", str(run), "--older-than", "0s", "--dry-run").stdout
    assert tables[0].exists()
    ptafuse("verify", str(run), "--repair", check=False)
    assert not tables[0].exists()
    assert "; 0 are not" in ptafuse("verify", str(run)).stdout
    tables[2].write_bytes(b"nothing")
    ptafuse("gc", str(run), "--older-than", "0s")
    assert not tables[2].exists()
    assert all(file.exists() for file in tables[3:])


def test_status_names_the_token_tables(run: Path) -> None:
    shown = ptafuse("status", str(run)).stdout
    for file in (run / "tokenizers").rglob("tokens.parquet"):
        assert str(file.relative_to(run)) in shown
