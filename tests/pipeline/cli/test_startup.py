"""What a command imports: one that computes with no model starts without torch and transformers, which take seconds."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_verify_repairs_and_gc_removes_bad_token_tables(run: Path) -> None:
    assert "token tables and maps are as they were written; 0 are not" in ptafuse("verify", str(run)).stdout
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
