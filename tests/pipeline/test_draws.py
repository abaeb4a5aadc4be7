"""A run with ``logits.tail_samples`` from the command line, to a trained model and everything that is shown of it."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.run.outcomes import read_training_log
from pipeline.run.records import recorded_run
from pipeline.run.steps import ResolvedRun, result_key
from stages.contract.columns import sparse_row
from stages.contract.store import Store
from tests.tiny_run import ptafuse, status

pytestmark = pytest.mark.slow

NUM_DRAWS = 4
FITTED = ("--set", "fuse.function=fitted")
WITH_DRAWS = (*FITTED, "--set", f"logits.tail_samples={NUM_DRAWS}", "--set", "name=draws")


@pytest.fixture(scope="module")
def run(undisturbed_run: Path, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a run directory with a configuration that draws, trained, and the same without draws, fused."""
    folder = Path(shutil.copytree(undisturbed_run, tmp_path_factory.mktemp("draws") / "run"))
    ptafuse("fuse", str(tiny_config), "--run", str(folder), "--local", "--upstream", *FITTED, "--set", "name=exact")
    ptafuse("train", str(tiny_config), "--run", str(folder), "--local", "--upstream", *WITH_DRAWS)
    return folder


def resolved(run: Path, name: str = "draws") -> ResolvedRun:
    return recorded_run(Store(str(run)), name)


def folder_of(run: Path, key: str, name: str = "draws") -> Path:
    return run / resolved(run, name).steps[key].folder


def test_only_steps_that_read_logits_are_recomputed(run: Path) -> None:
    assert folder_of(run, "shard") == folder_of(run, "shard", "exact")
    for key in ("logits/llama", "logits/neox", "align/neox", "fit", "fuse"):
        assert folder_of(run, key) != folder_of(run, key, "exact")


def test_weights_are_those_without_draws(run: Path) -> None:
    found, exact = (
        json.loads((run / result_key(resolved(run, name).steps["fit"])).read_text()) for name in ("draws", "exact")
    )
    assert found["rows"] == exact["rows"]
    assert found["num_tokens"] > 100


def test_rows_are_wider_and_sum_to_one(run: Path) -> None:
    widths = {}
    for key in ("align/neox", "fuse"):
        rows = []
        for path in sorted((folder_of(run, key) / "data").iterdir()):
            table = pq.read_table(path)
            for row in range(table.num_rows):
                part = sparse_row(table, row)
                mass = np.exp(part.logprobs.astype(np.float64)).sum(axis=1) + table["tail_mass"][row].values.to_numpy()
                assert mass[part.present] == pytest.approx(1, abs=5e-3)
                rows.append((part.ids >= 0).sum(axis=1))
        widths[key] = int(np.concatenate(rows).max())
    assert 10 < widths["align/neox"] <= 10 + NUM_DRAWS
    assert 10 + NUM_DRAWS < widths["fuse"] <= 10 + 2 * NUM_DRAWS


def test_training_learns_from_them(run: Path) -> None:
    log = read_training_log(resolved(run).steps["train"], Store(str(run)))
    assert len(log) > 2
    assert all(math.isfinite(step["loss_fusion"]) and step["loss_fusion"] > 0 for step in log)


def test_status_has_the_mass_of_the_tails_and_the_figures_of_exact_entries(run: Path) -> None:
    def health(name: str) -> dict[str, dict]:
        steps = json.loads(ptafuse("status", str(run), "--config", name, "--json").stdout)["steps"]
        return {step["step"]: step["health"] for step in steps}

    found, exact = health("draws"), health("exact")
    assert 0 < found["logits/llama"]["sampled_tail_mass"] <= found["logits/llama"]["tail_mass"] + 1e-3 < 1
    assert "tail_mass" not in exact["logits/llama"]
    for figure in ("completed_nll", "target_exact_nll", "floored_nll", "source_entropy"):
        assert found["align/neox"][figure] == exact["align/neox"][figure]
    assert found["fuse"]["target_exact_nll"] == exact["fuse"]["target_exact_nll"]
    # Rows of exact entries that were cut and stored once more, against the sum of what the candidates give.
    assert found["fuse"]["completed_nll"] == pytest.approx(exact["fuse"]["completed_nll"], rel=0.02)
    assert status(run)["shard"]["is_done"]


def test_compare_is_of_the_exact_entries(run: Path, tiny_config: Path) -> None:
    def compared(*sets: str) -> dict:
        return json.loads(ptafuse("compare", str(tiny_config), "--run", str(run), "--json", *sets).stdout)

    found, exact = compared(*WITH_DRAWS), compared(*FITTED, "--set", "name=exact")
    assert found["sources"] == exact["sources"]


def test_every_view_opens(run: Path, tiny_config: Path, tmp_path: Path) -> None:
    for key in ("logits/llama", "logits/neox", "align/neox", "fuse"):
        shown = ptafuse("inspect", str(run), key, "1", "--config", "draws", "--segment", "0", "--position", "3").stdout
        if key.startswith("logits"):
            assert f"{NUM_DRAWS} draws from the rest, each for " in shown
        if key == "align/neox":
            assert "neox top 10 and " in shown
    page = tmp_path / "page.html"
    assert "draws" in ptafuse("report", str(run), "--html", str(page)).stdout
    assert page.stat().st_size > 10_000
    ptafuse("interpret", str(tiny_config), "--run", str(run), *WITH_DRAWS)
    assert "logits/llama" in ptafuse("plan", str(tiny_config), "--run", str(run), *WITH_DRAWS).stdout
