"""A result stays in sight as long as its file is there, whatever its configuration's name came to stand for later."""

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.analysis.interpret.run import folder_of
from pipeline.analysis.interpret.tables import interpretations
from pipeline.report.held_out import held_out, held_out_table
from pipeline.report.page.page import report_page
from pipeline.report.reported import reported_runs
from pipeline.report.sweeps import sweep_results
from pipeline.report.teacher import teacher_rows
from pipeline.report.times import time_table
from pipeline.run.stage_table import FUSED
from pipeline.run.steps import result_key
from pipeline.state.status import read_status
from pipeline.workflow import sweep as sweeping
from pipeline.workflow.sweep import SweepConfig, run_sweep
from stages.contract.store import Store
from tests.pipeline.report.finished_runs import begin, evaluation, finish, put
from tests.tiny_run import ptafuse


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "run"))


@pytest.fixture
def changed_run(undisturbed_run: Path, tiny_config: Path, tmp_path: Path) -> Store:
    """Provide a finished run of which a stage was begun again with other settings, under the same name."""
    store = Store(str(shutil.copytree(undisturbed_run, tmp_path / "run")))
    begin(store, tiny_config, "align.epsilon=0.7")
    return store


def labels(store: Store) -> list[str]:
    return [run.label for run in reported_runs(store)]


def after(store: Store) -> dict[str, float | None]:
    rows = held_out(reported_runs(store), store)
    return {row.label: row.bits_per_byte for row in rows if row.label.startswith("after")}


def test_a_finished_configuration_stays_when_another_takes_its_name(store: Store, tiny_config: Path) -> None:
    finish(store, tiny_config, figure=0.9)
    begin(store, tiny_config, "align.epsilon=0.25")
    assert after(store) == {
        "after tiny (align.epsilon 0.2) (lambda 0.8, semi-relaxed)": 0.9,
        "after tiny (align.epsilon 0.25) (lambda 0.8, semi-relaxed)": None,
    }
    shown = " ".join(ptafuse("report", store.url).stdout.split())
    assert "0.9000" in shown


def test_a_configuration_without_any_result_is_shown_only_while_it_is_the_latest(
    store: Store, tiny_config: Path
) -> None:
    begin(store, tiny_config, "align.epsilon=0.1")
    assert labels(store) == ["tiny"]
    begin(store, tiny_config, "align.epsilon=0.3")
    assert labels(store) == ["tiny"]
    finish(store, tiny_config, "train.seed=1")
    assert labels(store) == ["tiny"]
    finish(store, tiny_config, "train.seed=2")
    assert labels(store) == ["tiny (train.seed 1)", "tiny (train.seed 2)"]


def test_a_result_is_shown_once(store: Store, tiny_config: Path) -> None:
    finish(store, tiny_config, figure=0.9)
    finish(store, tiny_config, "engine.num_cpus=3", figure=0.9)
    assert after(store) == {"after tiny (lambda 0.8, semi-relaxed)": 0.9}
    assert labels(store) == ["tiny"]
    finish(store, tiny_config, "name=same", figure=0.9)
    assert after(store) == {"after tiny, same (lambda 0.8, semi-relaxed)": 0.9}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (
            (),
            ("align.preset=paper", "fuse.packing=whole"),
            ("align.preset semi-relaxed", "align.preset paper"),
        ),
        (
            (),
            ("align.preset=paper", "fuse.packing=whole", "align.epsilon=0.5"),
            ("align.preset semi-relaxed, align.epsilon 0.2", "align.preset paper, align.epsilon 0.5"),
        ),
        (("train.lora.r=4",), ("train.lora.r=8",), ("train.lora.r 4", "train.lora.r 8")),
        (("baselines.ensemble=true",), ("train.seed=3",), ("train.seed 42", "train.seed 3")),
        (
            ('train.lora.target_modules=["q_proj", "v_proj"]',),
            ('train.lora.target_modules="all-linear"',),
            ("train.lora.target_modules q_proj v_proj", "train.lora.target_modules all-linear"),
        ),
        ((), ("shard.test_fraction=0.1",), ("shard.test_fraction 0", "shard.test_fraction 0.1")),
        ((), ("target.name=other",), ("target.name llama", "target.name other")),
    ],
)
def test_configurations_of_one_name_are_distinguished_by_their_differing_settings(
    store: Store, tiny_config: Path, first: tuple, second: tuple, expected: tuple
) -> None:
    for overrides in (first, second):
        finish(store, tiny_config, "train.num_epochs=2", *overrides)
    assert labels(store) == [f"tiny ({words})" for words in expected]


def test_configurations_that_differ_only_in_runtime_settings_are_distinguished(store: Store, tiny_config: Path) -> None:
    with_ensemble = finish(store, tiny_config, "baselines.ensemble=true")
    put(store, with_ensemble, "ensemble", evaluation([0.7], [100]))
    finish(store, tiny_config)
    assert labels(store) == ["tiny (baselines.ensemble true)", "tiny (baselines.ensemble false)"]
    rows = held_out(reported_runs(store), store)
    assert [row.bits_per_byte for row in rows if row.label.startswith("ensemble")] == [0.7]
    assert list(after(store)) == ["after tiny (lambda 0.8, semi-relaxed)"], "what differs does not matter to it"


def test_different_targets_are_distinguished_in_the_table(store: Store, tiny_config: Path) -> None:
    for setting, figure in (("eval.max_length=64", 1.0), ("eval.max_length=32", 2.0)):
        put(store, finish(store, tiny_config, setting), "llama", evaluation([figure], [100]))
    rows = held_out(reported_runs(store), store)
    assert [row.label for row in rows if row.label.startswith("target")] == [
        "target llama before, tiny (eval.max_length 64)",
        "target llama before, tiny (eval.max_length 32)",
    ]


def test_the_reference_on_gold_tokens_is_found_under_a_name_that_was_taken(store: Store, tiny_config: Path) -> None:
    finish(store, tiny_config, "train.lambda=1.0")
    finish(store, tiny_config, "train.lambda=0.5", figure=0.8)
    table = held_out_table(held_out(reported_runs(store), store))
    assert table.rows[-1][0] == "after tiny (train.lambda 0.5) (lambda 0.5, semi-relaxed)"
    assert table.rows[-1][3].startswith("-0.2000")


def test_teacher_and_time_tables_keep_what_was_computed(changed_run: Store) -> None:
    runs = reported_runs(changed_run)
    assert [run.label for run in runs] == ["tiny (align.epsilon 0.2)", "tiny (align.epsilon 0.7)"]
    statuses = {run.label: read_status(run, changed_run) for run in runs}
    assert [(row.run, row.name) for row in teacher_rows(runs, statuses)] == [
        ("tiny (align.epsilon 0.2)", "aligned neox"),
        ("tiny (align.epsilon 0.2)", "fused"),
    ]
    times = time_table(runs, statuses, changed_run)
    # An evaluation of a few documents may take less than the tenth of a second that is recorded.
    assert {"train", "align/neox"} <= {row[0] for row in times.rows}


def test_the_page_shows_results_under_changed_settings(changed_run: Store) -> None:
    page = report_page(changed_run, max_positions=200)
    assert page.count("tiny (align.epsilon 0.2)") > 3
    assert "tiny (align.epsilon 0.7)" in page
    (result,) = Path(changed_run.url).glob("eval/fused/*/*.json")
    assert f"{json.loads(result.read_text())['bits_per_byte']:.4f}" in page


def test_an_interpretation_stays_until_there_is_another_of_the_same_distributions(
    store: Store, tiny_config: Path
) -> None:
    def shown() -> list[int]:
        return [figures["sample"] for _, figures in interpretations(reported_runs(store), store)]

    for sample in (10, 20):
        run = begin(store, tiny_config, f"interpret.max_positions={sample}")
        store.replace(f"{folder_of(run)}/figures.json", json.dumps({"sample": sample}).encode())
        assert shown() == [sample]
        begin(store, tiny_config, "interpret.max_positions=30")
        assert shown() == [sample]


def test_status_speaks_of_the_latest_configuration_of_a_name(changed_run: Store) -> None:
    following = json.loads(ptafuse("status", changed_run.url, "--json").stdout)["next_command"]
    assert "make align" in following
    assert "align.epsilon=0.7" in following


def test_an_older_record_of_another_version_is_left_out(store: Store, tiny_config: Path) -> None:
    old = finish(store, tiny_config, "train.seed=1")
    value = json.loads(store.read(old.record_key))
    value["config"]["train"]["forgotten"] = 3
    store.replace(old.record_key, json.dumps(value).encode())
    with pytest.raises(ValueError, match="was recorded by another version"):
        reported_runs(store)
    finish(store, tiny_config, "train.seed=2")
    assert labels(store) == ["tiny"]


SWEEP = {
    "name": "s",
    "baseline": "gold",
    "seeds": [1],
    "variants": [{"name": "gold", "set": {"train.lambda": 1.0}}, {"name": "plain"}],
}


@pytest.fixture
def swept(store: Store, tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> SweepConfig:
    """A sweep whose cells are finished."""

    def compute(run: object) -> None:
        figure = 1.0 if run.config.train.lambda_ == 1 else 0.9
        for step in run.resolved.of_stage("eval"):
            put(run.store, run.resolved, step.model, evaluation([figure, figure], [100, 100]))

    monkeypatch.setattr(sweeping, "run_all_stages", compute)
    monkeypatch.setattr(sweeping, "discard_model", lambda run: None)
    sweep = SweepConfig.model_validate({**SWEEP, "config": str(tiny_config)})
    run_sweep(sweep, store.url, Console(quiet=True), local=True)
    return sweep


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_later_configuration_of_a_cell_s_name_does_not_hide_the_cell(
    store: Store, tiny_config: Path, swept: SweepConfig, is_finished: bool
) -> None:
    before = sweep_results(swept, store)
    assert [result.bits_per_byte for result in before[:2]] == [(1.0,), (0.9,)]
    later = ("name=s-plain-seed1", "train.seed=1", "align.epsilon=0.7")
    finish(store, tiny_config, *later, figure=5.0) if is_finished else begin(store, tiny_config, *later)
    begin(store, tiny_config, "name=s-plain-seed1", "train.seed=1")  # the cell itself, asked for in other words
    begin(store, tiny_config, *later)
    assert sweep_results(swept, store) == before
    assert (sum("5.0000" in row[1] for row in held_out_table(held_out(reported_runs(store), store)).rows) == 1) == (
        is_finished
    )


def test_a_cell_of_a_sweep_recorded_before_is_found_by_what_was_asked_for(
    store: Store, tiny_config: Path, swept: SweepConfig
) -> None:
    key = f"sweeps/{swept.name}.json"
    record = json.loads(store.read(key))
    del record["runs"]
    store.replace(key, json.dumps(record).encode())
    before = sweep_results(swept, store)
    begin(store, tiny_config, "name=s-plain-seed1", "train.seed=1", "align.epsilon=0.7")
    finish(
        store, tiny_config, "name=s-gold-seed1", "train.seed=1", "train.lambda=1.0", "train.num_epochs=9", figure=7.0
    )
    assert sweep_results(swept, store) == before


def test_a_cell_whose_settings_changed_is_not_shown_with_its_old_figure(
    store: Store, tiny_config: Path, tmp_path: Path, swept: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(run: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeping, "run_all_stages", killed)
    longer = swept.model_copy(update={"set": {"train.num_epochs": 2}})
    with pytest.raises(KeyboardInterrupt):
        run_sweep(longer, store.url, Console(quiet=True), local=True)
    assert [result.bits_per_byte for result in sweep_results(longer, store)[:2]] == [(), ()]


def test_the_page_shows_what_took_the_name_of_a_large_sweep_s_cell(
    store: Store, tiny_config: Path, swept: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.report.page.page.MAX_CELLS_SHOWN", 1)
    finish(store, tiny_config, "name=other", figure=2.0)
    finish(store, tiny_config, "name=s-plain-seed1", "train.seed=1", "align.epsilon=0.7", figure=5.0)
    page = report_page(store)
    assert "after s-plain-seed1 (align.epsilon 0.7)" in page
    assert "after s-plain-seed1 (align.epsilon 0.2)" not in page
    assert "after s-gold" not in page


def test_the_page_compares_with_a_cell_of_a_large_sweep_that_it_does_not_list(
    store: Store, tiny_config: Path, swept: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.report.page.page.MAX_CELLS_SHOWN", 1)
    finish(store, tiny_config, "name=other", "train.seed=1", "align.epsilon=0.7", figure=0.75)
    page = report_page(store)
    assert "-0.2500" in page
    assert "against gold only: after other" not in page


def test_what_is_not_evaluated_is_not_said_to_have_a_result(store: Store, tiny_config: Path) -> None:
    run = begin(store, tiny_config)
    assert not store.exists(result_key(run.steps[f"eval/{FUSED}"]))
    assert after(store) == {"after tiny (lambda 0.8, semi-relaxed)": None}
