"""Status: what it warns of, and how progress is shown."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.engine.progress import StepProgress
from pipeline.engine.worker import ShardStatus
from pipeline.run.records import recorded_run, recorded_runs
from pipeline.run.stage_table import STAGES
from pipeline.state.status import RunStatus, StepStatus, read_status
from pipeline.state.status_view import HEADLINES, ONLY_IF_ANY, WHOLES, print_status
from stages.contract.manifest import Mean
from stages.contract.store import Store
from tests.tiny_run import ptafuse


@pytest.mark.slow
def test_low_coverage_and_quarantine_are_warned_of(undisturbed_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(undisturbed_run, tmp_path / "run"))
    store = Store(str(run))
    assert read_status(recorded_run(store), store).warnings == ()
    for path in run.glob("align/neox/*/manifests/*.json"):
        manifest = json.loads(path.read_text())
        manifest["health"]["covered"] = manifest["health"]["positions"] // 3
        manifest["num_quarantined"] = 1
        path.write_text(json.dumps(manifest))
    low, quarantined = read_status(recorded_run(store), store).warnings
    assert "align/neox: only 33% of the positions" in low
    assert "align/neox: 6 records are in quarantine" in quarantined


@pytest.mark.slow
def test_status_shows_important_metrics_and_the_others_with_all(undisturbed_run: Path) -> None:
    shown = ptafuse("status", str(undisturbed_run)).stdout
    assert re.search(r"│ shard +│ documents +│ +23 │ documents that became segments", shown)
    assert re.search(r"│ align/neox +│ covered +│ +[\d,]+ \(\d+%\) │ positions that got a distribution", shown)
    assert "one_to_one" not in shown
    assert "unconverged" not in shown, "nothing is out of the ordinary"
    number = int(re.search(rf"(\d+) more metrics: ptafuse status {undisturbed_run} --all", shown)[1])  # type: ignore[index]
    everything = ptafuse("status", str(undisturbed_run), "--all").stdout
    assert "one_to_one" in everything
    assert "more metrics" not in everything
    assert _num_figures(everything) - _num_figures(shown) == number


@pytest.mark.parametrize(("excluded", "value"), [(0, "1.5"), (3, "inf (1.5 elsewhere)")])
def test_a_mean_without_infinite_values_is_marked_as_partial(excluded: int, value: str) -> None:
    health = {"positions": 10, "covered": 10, "gold_excluded": excluded, "completed_nll": Mean(total=1.5 * 7, count=7)}
    console = Console(file=io.StringIO(), width=120)
    print_status(RunStatus("run", "x", (StepStatus("align/a", "0", health=health),), None), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(rf"completed_nll +│ +{re.escape(value)} │", shown)
    assert ("3 (30%)" in shown) == bool(excluded)


def _num_figures(shown: str) -> int:
    rows = [line.split("│") for line in shown.partition("health")[2].splitlines() if line.startswith("│ ")]
    return sum(bool(row[2].strip()) for row in rows)  # without lines on which a cell goes on


@pytest.mark.slow
def test_every_figure_that_is_shown_is_one_that_its_stage_gives(undisturbed_run: Path) -> None:
    store = Store(str(undisturbed_run))
    given = {step.stage: set(step.metrics) for step in read_status(recorded_run(store), store).steps}
    wanted = {stage: set(names) for stage, names in HEADLINES.items()}
    assert wanted["shard"] - given["shard"] == {
        "control_token_documents",
        "quarantined/",
        "test_segments",
        "unlearnt_conversations",
    }, "where there are any"
    for stage in ("logits", "align", "fuse"):
        assert wanted[stage] <= given[stage]
    assert set(wanted) == {spec.name for spec in STAGES} - {"adapt", "train", "eval"}
    assert {name for names in wanted.values() for name in names} >= {*ONLY_IF_ANY, *WHOLES}


@pytest.mark.slow
def test_health_adds_up_over_shards(undisturbed_run: Path) -> None:
    store = Store(str(undisturbed_run))
    run = recorded_run(store)
    step = next(step for step in read_status(run, store).steps if step.key == "align/neox")
    manifests = store.manifests(run.steps["align/neox"].folder)
    assert step.health["positions"] == sum(manifest.health["positions"] for manifest in manifests.values())
    nll = step.health["floored_nll"]
    assert isinstance(nll, Mean)
    parts = [manifest.health["floored_nll"] for manifest in manifests.values()]
    assert nll.value == pytest.approx(sum(part.total for part in parts) / sum(part.count for part in parts))


@pytest.mark.slow
def test_recorded_configuration_is_what_ran(undisturbed_run: Path, tiny_config: Path) -> None:
    store = Store(str(undisturbed_run))
    [run] = recorded_runs(store)
    assert run.request.config_path == str(tiny_config)
    assert run.config.name == "tiny"
    with pytest.raises(ValueError, match="no configuration named 'other' has been run here"):
        recorded_run(store, "other")


def test_status_of_an_empty_folder_says_how_to_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no configuration has been run here; start with `make shard RUN="):
        recorded_run(Store(str(tmp_path)))


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_counts_shards_tokens_and_failures(terminal: bool) -> None:
    out = io.StringIO()
    with StepProgress(Console(file=out, force_terminal=terminal, width=120), "align/x", 4, 1) as progress:
        progress.add(ShardStatus(1, "done", 1000, 0.1, 1))
        progress.add(ShardStatus(2, "failed", message="broken"))
        progress.add(ShardStatus(3, "done", 500, 0.1, 1))
    assert "tokens/s" in out.getvalue()
    assert "align/x" in out.getvalue()
    assert progress.summary().startswith("align/x: 2 shards, 1,500 tokens in")
    if not terminal:
        assert "align/x: 3 of 4 shards to do" in out.getvalue()
        assert "3/4 shards, 1 failed" in out.getvalue()
