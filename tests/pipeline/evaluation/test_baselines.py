"""The baselines of a run: what is evaluated once and never again, what is refused, and where it shows."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.report.held_out import held_out
from pipeline.run.records import recorded_run
from pipeline.settings.load import ConfigError, load_config
from stages.contract.store import Store
from tests.tiny_models import save_model
from tests.tiny_run import ptafuse

BOTH = ("--set=baselines.ensemble=true", "--set=baselines.weight_average=true")


def results(run: Path) -> dict[str, dict]:
    return {path.parent.parent.name: json.loads(path.read_text()) for path in run.glob("eval/*/*/*.json")}


@pytest.fixture(scope="module")
def evaluated(tiny_config: Path, undisturbed_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Path(shutil.copytree(undisturbed_run, tmp_path_factory.mktemp("baselines") / "run"))
    ptafuse("eval", str(tiny_config), "--run", str(run), "--local", *BOTH)
    return run


@pytest.mark.slow
def test_baselines_are_evaluated_without_changing_the_models_results(evaluated: Path, undisturbed_run: Path) -> None:
    found, before = results(evaluated), results(undisturbed_run)
    assert found.keys() - before.keys() == {"ensemble", "weight-average"}
    assert all(found[name] == before[name] for name in before)
    assert found["ensemble"]["num_bytes"] == found["llama"]["num_bytes"]
    assert [part["doc_id"] for part in found["ensemble"]["documents"]] == [
        part["doc_id"] for part in found["llama"]["documents"]
    ]
    assert (
        "llama and neox have different architectures: model_type llama against gpt_neox"
        in (found["weight-average"]["refused"])
    )
    assert not list(evaluated.glob("eval/weight-average/*/model"))


@pytest.mark.slow
def test_nothing_is_evaluated_twice_refusals_included(tiny_config: Path, evaluated: Path, monkeypatch) -> None:
    def must_not_run(*_, **__) -> None:
        raise AssertionError("evaluated again")

    monkeypatch.setattr("pipeline.evaluation.eval_stage._evaluate", must_not_run)
    done = ptafuse("eval", str(tiny_config), "--run", str(evaluated), "--local", *BOTH)
    assert "eval: nothing to do" in done.stdout


@pytest.mark.slow
def test_reports_show_the_figure_and_the_refusal(evaluated: Path) -> None:
    words = ptafuse("report", str(evaluated)).stdout.split()  # the table breaks its cells into lines
    assert {"ensemble", "refused", "gpt_neox,"} <= set(words)
    store = Store(str(evaluated))
    rows = {row.label: row for row in held_out([recorded_run(store)], store)}
    ensemble = rows["ensemble of target and sources (0.5 neox, semi-relaxed, contexts by prefix)"]
    assert ensemble.bits_per_byte == results(evaluated)["ensemble"]["bits_per_byte"]
    assert ensemble.against_before is not None
    average = rows["average of the weights (0.5 llama + 0.5 neox)"]
    assert average.bits_per_byte is None
    assert str(average.refused).startswith("llama and neox have different architectures")
    (card,) = evaluated.glob("train/*/model/README.md")
    assert "ensemble of target and sources" in card.read_text()


@pytest.mark.slow
def test_status_and_plan_know_the_baselines(tiny_config: Path, evaluated: Path) -> None:
    for command in ("status", "plan"):
        steps = json.loads(
            ptafuse(*_arguments(command, tiny_config, evaluated), "--json").stdout
        )["steps"]  # fmt: skip
        assert {"eval/ensemble", "eval/weight-average"} <= {step["step"] for step in steps}


def _arguments(command: str, config: Path, run: Path) -> list[str]:
    return ["status", str(run)] if command == "status" else ["plan", str(config), "--run", str(run), *BOTH]


@pytest.mark.slow
def test_only_settings_that_an_ensemble_reads_make_another_of_it(tiny_config: Path, evaluated: Path) -> None:
    def fingerprint(*sets: str) -> str:
        arguments = [*BOTH, *(f"--set={part}" for part in sets)]
        ptafuse("plan", str(tiny_config), "--run", str(evaluated), *arguments, "--json")
        plan = json.loads(ptafuse("plan", str(tiny_config), "--run", str(evaluated), *arguments, "--json").stdout)
        return next(step["fingerprint"] for step in plan["steps"] if step["step"] == "eval/ensemble")

    own = fingerprint()
    assert fingerprint("baselines.ensemble_weights=[0.5]", "baselines.average_weights=[0.1]") == own
    assert fingerprint("train.lambda=0.5", "fuse.granularity=document", "align.inexact=gold") == own
    others = [("baselines.ensemble_weights=[0.4]",), ("baselines.ensemble_contexts=segment",), ("align.epsilon=0.5",)]
    assert len({own, *(fingerprint(*sets) for sets in others)}) == 4


@pytest.mark.slow
def test_two_models_of_one_family_are_averaged_in_a_run(tiny_config: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "twin", architecture="llama", tokenizer_family="spm-bpe", seed=7)
    run = tmp_path / "run"
    sets = (
        f'--set=sources=[{{name = "twin", path = "{tmp_path / "twin"}"}}]',
        "--set=baselines.weight_average=true",
    )
    ptafuse("shard", str(tiny_config), "--run", str(run), "--local", *sets)
    done = ptafuse("eval", str(tiny_config), "--run", str(run), "--local", *sets, check=False)
    assert "the trained model is not evaluated" in done.stderr
    found = results(run)
    assert found.keys() == {"llama", "twin", "weight-average"}
    assert found["weight-average"]["num_bytes"] == found["llama"]["num_bytes"]
    assert not list(run.glob("eval/weight-average/*/model"))


@pytest.mark.parametrize("name", ["ensemble", "weight-average"])
def test_a_model_cannot_have_a_baselines_name(tiny_config: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot be named '{name}'"):
        load_config(tiny_config, (f'target.name="{name}"',))
