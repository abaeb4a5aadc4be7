"""``ptafuse sweep``: cells, sharing of stages, going on after a stop, and figures against their definitions."""

import json
import math
import tomllib
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pipeline.report.sweeps import sweep_results, sweep_table
from pipeline.run.session import Run
from pipeline.run.steps import result_key
from pipeline.settings.load import ConfigError, shipped_configs, shipped_sweeps
from pipeline.workflow import sweep as sweeping
from pipeline.workflow.sweep import SweepConfig, cells_of, load_sweep, recorded_sweeps, run_name, run_sweep
from stages.contract.store import Store
from tests.tiny_run import data_hashes, ptafuse

SWEEP = """
name = "lambda"
config = "{config}"
seeds = [1, 2]
baseline = "gold"

[set]
"train.batch_size" = 8

[[variants]]
name = "gold"
set = {{ "train.lambda" = 1.0 }}

[[variants]]
name = "fused"
set = {{ "train.lambda" = [0.8, 0.2] }}
"""


@pytest.fixture
def sweep_file(tiny_config: Path, tmp_path: Path) -> Path:
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP.format(config=tiny_config))
    return path


def test_lists_of_values_are_combined() -> None:
    sweep = SweepConfig.model_validate(
        {
            "name": "s",
            "config": "demo",
            "set": {"train.num_epochs": 2},
            "variants": [
                {"name": "plain"},
                {"name": "grid", "set": {"align.epsilon": [0.1, 0.5], "align.cost": ["prefix", "semantic"]}},
            ],
        }
    )
    cells = {cell.name: cell.overrides for cell in cells_of(sweep)}
    assert list(cells) == [
        "plain",
        *(f"grid-epsilon-{epsilon}-cost-{cost}" for epsilon in (0.1, 0.5) for cost in ("prefix", "semantic")),
    ]
    assert cells["plain"] == ("train.num_epochs=2",)
    assert set(cells["grid-epsilon-0.5-cost-prefix"]) == {
        "train.num_epochs=2",
        "align.epsilon=0.5",
        'align.cost="prefix"',
    }


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            'baseline = "gold"',
            'baseline = "silver"',
            "baseline = 'silver' is not one of the cells: gold, fused-lambda-0.8",
        ),
        ("[0.8, 0.2]", "[0.8, 0.8]", "names of cells must differ .*'fused-lambda-0.8' is given twice"),
        ("[0.8, 0.2]", "[0.8, 7.5]", "cell fused-lambda-7.5"),
        ('"train.batch_size"', '"train.batchsize"', "unknown setting"),
        ("seeds", "sedes", "sedes: unknown setting; did you mean 'seeds'"),
        ("seeds", "name_seeds = false\nseeds", "name_seeds = false gives 2 seeds of a cell the same name"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_runs(sweep_file: Path, before: str, after: str, message: str) -> None:
    text = sweep_file.read_text()
    assert before in text
    sweep_file.write_text(text.replace(before, after))
    with pytest.raises(ConfigError, match=message):
        load_sweep(sweep_file)


def test_names_of_a_sweep_may_have_upper_case_and_must_differ_without_it(sweep_file: Path) -> None:
    text = sweep_file.read_text().replace('"lambda"', '"Lambda-A"').replace('"gold"', '"Gold"')
    sweep_file.write_text(text)
    sweep = load_sweep(sweep_file)
    assert next(run_name(sweep, cell, 1) for cell in cells_of(sweep)) == "Lambda-A-Gold-seed1"
    sweep_file.write_text(text.replace('"fused"', '"gold"').replace("[0.8, 0.2]", "0.8"))
    with pytest.raises(ConfigError, match="names of cells must differ in more than the case of letters"):
        load_sweep(sweep_file)


def test_sweeps_whose_names_differ_only_in_case_are_refused(sweep_file: Path, tmp_path: Path) -> None:
    Store(str(tmp_path / "run")).replace("sweeps/Lambda.json", b"{}")
    with pytest.raises(
        ConfigError, match=r"sweep 'lambda': .* holds the sweep 'Lambda'.*more than the case of letters"
    ):
        run_sweep(load_sweep(sweep_file), str(tmp_path / "run"), Console(quiet=True), local=True)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('"shard.validation_fraction" = 0.5', "shard.validation_fraction is 0.5, there 0.25"),
        (
            '"eval.split" = "test", "shard.test_fraction" = 0.1',
            "shard.test_fraction is 0.1, there 0.0; eval.split is test",
        ),
        ('"eval.max_documents" = 3', "eval.max_documents is 3, there none"),
        ('"dataset.max_documents" = 20', "dataset.max_documents is 20, there none"),
        ('"dataset.path" = "elsewhere.jsonl"', "dataset.path is "),
        ('"shard.max_length" = 32', "shard.max_length is 32, there 64"),
    ],
)
def test_cells_that_score_other_documents_than_the_baseline_are_refused_before_anything_is_trained(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, message: str
) -> None:
    def must_not_run(*_: object) -> None:
        raise AssertionError("it runs")

    monkeypatch.setattr(sweeping, "run_all_stages", must_not_run)
    text = sweep_file.read_text().replace('"train.lambda" = [0.8, 0.2]', f'"train.lambda" = [0.8, 0.2], {setting}')
    sweep_file.write_text(text)
    with pytest.raises(ConfigError, match=f"cell fused-lambda-0.8: {message}") as refused:
        load_sweep(sweep_file)
    assert "gold" in str(refused.value)
    unchecked = SweepConfig.model_validate(tomllib.loads(text))
    with pytest.raises(ConfigError, match=message):
        run_sweep(unchecked, str(tmp_path / "run"), Console(quiet=True), local=True)
    assert not (tmp_path / "run").exists()
    sweep_file.write_text(text.replace('baseline = "gold"', ""))
    assert load_sweep(sweep_file).baseline is None, "nothing is compared, so each cell may have its own documents"


def test_what_changes_no_document_may_differ_between_cells(sweep_file: Path) -> None:
    settings = '"shard.documents_per_shard" = 5, "eval.batch_tokens" = 512, "dataset.kind_column" = "kind"'
    text = sweep_file.read_text().replace('"train.lambda" = [0.8, 0.2]', f'"train.lambda" = [0.8, 0.2], {settings}')
    sweep_file.write_text(text)
    assert len(cells_of(load_sweep(sweep_file))) == 3


@pytest.mark.parametrize("path", shipped_sweeps(), ids=lambda path: path.stem)
def test_every_shipped_sweep_loads_by_its_name_and_names_a_shipped_configuration(path: Path) -> None:
    sweep = load_sweep(Path(path.stem))
    assert sweep.name == path.stem
    assert sweep.config in [config.stem for config in shipped_configs()]


def test_the_demo_s_configurations_are_named_without_a_seed() -> None:
    sweep = load_sweep(Path("demo"))
    names = [run_name(sweep, cell, seed) for cell in cells_of(sweep) for seed in sweep.seeds]
    assert names == ["demo-semi-relaxed", "demo-gold-only"]


def test_a_sweep_that_is_not_there_is_refused_with_the_shipped_ones() -> None:
    with pytest.raises(
        ConfigError,
        match=r"no such sweep: nope\.toml.*demo-paper, demo, study-docs-qwen-test, study-docs-test, study-docs-whole, "
        r".*study-mixed-test, study-two-sources-test",
    ):
        load_sweep(Path("nope.toml"))


def test_a_check_lists_the_cells_and_runs_nothing(sweep_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shown = ptafuse("sweep", str(sweep_file), "--run", str(run), "--check").stdout
    assert "6 trainings" in " ".join(shown.split())
    assert all(cell in shown for cell in ("gold", "fused-lambda-0.8", "fused-lambda-0.2"))
    assert not run.exists()


@pytest.mark.slow
def test_a_stopped_sweep_resumes_and_computes_nothing_twice(sweep_file: Path, tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "run"
    whole = sweep_file.read_text()
    sweep_file.write_text(whole.replace("seeds = [1, 2]", "seeds = [1]"))
    ptafuse("sweep", str(sweep_file), "--run", str(run), "--local")
    before = data_hashes(run)
    figures = {path: path.read_bytes() for path in run.glob("eval/fused/*/*.json")}
    manifests = {path: path.stat().st_mtime_ns for path in run.glob("**/manifests/*.json")}
    assert len(figures) == 3
    assert len({folder for folder in before if folder.startswith("fuse")}) == 1  # all cells share what is before train
    assert not list(run.glob("train/*/model"))  # removed when they were evaluated

    sweep_file.write_text(whole)
    shown = ptafuse("sweep", str(sweep_file), "--run", str(run), "--local").stdout
    assert shown.count("nothing to do\n") >= 3
    assert {path: path.stat().st_mtime_ns for path in run.glob("**/manifests/*.json")} == manifests
    assert all(path.read_bytes() == value for path, value in figures.items())
    assert len(list(run.glob("eval/fused/*/*.json"))) == 6

    store = Store(str(run))
    (sweep,) = recorded_sweeps(store)
    results = {result.name: result for result in sweep_results(sweep, store)}
    assert results["gold"].against_baseline is None
    by_name = {
        record["config"]["name"]: json.loads((run / "eval" / "fused" / name / "bits-per-byte.json").read_text())
        for record in (json.loads(path.read_text()) for path in run.glob("configs/*.json"))
        for name in [record["steps"]["eval/fused"]["fingerprint"]]
    }
    differences = [
        by_name[f"lambda-fused-lambda-0.2-seed{seed}"]["bits_per_byte"]
        - by_name[f"lambda-gold-seed{seed}"]["bits_per_byte"]
        for seed in (1, 2)
    ]
    found = results["fused-lambda-0.2"]
    assert found.against_baseline.mean == pytest.approx(np.mean(differences), abs=1e-6)
    assert found.seed_error == pytest.approx(abs(differences[0] - differences[1]) / 2, abs=1e-6)
    assert not math.isnan(found.against_baseline.error)
    table = sweep_table(sweep, list(results.values()))
    assert [row[:2] for row in table.rows] == [
        ("gold", "2"), ("fused-lambda-0.8", "2"), ("fused-lambda-0.2", "2"), ("source neox", ""), ("target llama before", "")
    ]  # fmt: skip
    before_training = json.loads(next(run.glob("eval/llama/*/bits-per-byte.json")).read_text())["bits_per_byte"]
    gold = np.mean([by_name[f"lambda-gold-seed{seed}"]["bits_per_byte"] for seed in (1, 2)])
    assert results["target llama before"].against_baseline.mean == pytest.approx(before_training - gold, abs=1e-6)
    assert results["source neox"].against_baseline is None


def test_baselines_that_are_asked_for_later_are_evaluated_without_training_again(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    evaluated: list[str] = []

    def compute(run: Run) -> None:
        trained.append(run.config.name)
        evaluate(run)

    def evaluate(run: Run, call: object = None) -> None:
        for step in run.resolved.of_stage("eval"):
            if not run.store.exists(result_key(step)):
                run.store.create(result_key(step), b"{}")
                evaluated.append(step.key)

    def go(path: Path) -> None:
        run_sweep(load_sweep(path), str(tmp_path / "run"), Console(quiet=True), local=True)

    monkeypatch.setattr(sweeping, "run_all_stages", compute)
    monkeypatch.setattr(sweeping, "discard_model", lambda run: None)
    monkeypatch.setattr("pipeline.evaluation.eval_stage.run_eval", evaluate)
    go(sweep_file)
    assert len(trained) == 6
    assert not {"eval/ensemble", "eval/weight-average"} & set(evaluated)
    asked = sweep_file.read_text().replace('"train.lambda" = 1.0', '"train.lambda" = 1.0, "baselines.ensemble" = true')
    sweep_file.write_text(asked)
    evaluated.clear()
    go(sweep_file)
    assert len(trained) == 6
    assert set(evaluated) == {"eval/ensemble"}
