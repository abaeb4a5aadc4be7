"""``ptafuse eval --suite``: results in the run directory, resumed, refused with reasons, and shown."""

import dataclasses
import json
import shutil
import socket
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (requirements-eval.txt)")

from pipeline.evaluation.suites import run as suites
from pipeline.evaluation.suites.catalogue import SUITES as SUITES_BY_NAME
from pipeline.evaluation.suites.figures import difference, figure
from pipeline.evaluation.suites.languages import LanguageMissingError
from pipeline.evaluation.suites.results import suite_rows
from pipeline.report.page.page import report_page
from pipeline.run.records import recorded_run
from pipeline.run.session import Run, open_run
from pipeline.run.steps import Request
from stages.contract.store import Store
from tests.pipeline.evaluation.suites.tiny_data import save_data
from tests.tiny_run import ptafuse

SUITES = ("--suite", "lambada", "--suite", "mmlu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(undisturbed_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(undisturbed_run, tmp_path_factory.mktemp("suites") / "run"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("PTAFUSE_DATA", raising=False)
    return


@pytest.fixture(scope="module")
def evaluated(run: Path, tiny_config: Path, data: Path) -> Path:
    evaluate(run, tiny_config, data, *SUITES)
    return run


def evaluate(run: Path, config: Path, data: Path | None, *arguments: str, check: bool = True):
    place = () if data is None else ("--set", f"eval.data={data}")
    return ptafuse("eval", str(config), "--run", str(run), "--local", *place, *arguments, check=check)


def results(run: Path) -> dict[tuple[str, str], dict]:
    found = [json.loads(path.read_text()) for path in sorted(run.glob("suites/*/*/*.json"))]
    return {(f"{part['suite']}/{part['subtask']}", part["model"]): part for part in found}


def test_each_sub_task_of_each_model_has_its_result(evaluated: Path) -> None:
    found = results(evaluated)
    tasks = ("lambada/lambada_openai", "mmlu/astronomy", "mmlu/philosophy")
    assert set(found) == {(task, model) for task in tasks for model in ("llama", "fused")}
    for (task, _), part in found.items():
        assert part["settings"]["harness"] == metadata.version("lm_eval")
        assert part["data"].startswith("sha256:")
        assert part["num_documents"] == part["num_documents_in_data"] == 6
        for key, metric in part["metrics"].items():
            kind = "perplexity" if key.startswith("perplexity") else "mean"
            value, error = figure([np.array(part["documents"][key])], kind)
            assert (metric["value"], metric["standard_error"]) == pytest.approx((value, error))
        assert part["settings"]["num_fewshot"] == (5 if task == "mmlu/astronomy" else 0)
    assert found["mmlu/astronomy", "llama"]["num_subtasks"] == 57


def test_finished_results_are_not_computed_again(evaluated: Path, tiny_config: Path, data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in evaluated.glob("suites/*/*/*.json")}
    again = evaluate(evaluated, tiny_config, data, *SUITES)
    assert "suites of llama: nothing to do" in again.stdout
    assert "suites of fused: nothing to do" in again.stdout
    lost = next(evaluated.glob("suites/mmlu/philosophy/*.json"))
    content = json.loads(lost.read_text())
    lost.unlink()
    resumed = evaluate(evaluated, tiny_config, data, *SUITES)
    assert resumed.stdout.count("mmlu/philosophy of") == 1
    assert "astronomy" not in resumed.stdout
    assert json.loads(lost.read_text()) | {"seconds": 0} == content | {"seconds": 0}
    assert {path: path.stat().st_mtime_ns for path in before if path != lost} == {
        path: time for path, time in before.items() if path != lost
    }


def test_a_task_whose_worker_died_repeats_its_output(
    evaluated: Path, tiny_config: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray calls it from the beginning, and drops as many values as it has had."""
    mine = Path(shutil.copytree(evaluated, tmp_path / "run"))
    opened, tasks, inputs = planned(mine, tiny_config, data)
    loaded = []
    load = suites.load_harness_model
    monkeypatch.setattr(
        suites, "load_harness_model", lambda *names, **settings: loaded.append(1) or load(*names, **settings)
    )
    said = list(suites._run_tasks(opened, "llama", inputs, tasks))
    assert [line.split(" of ")[0] for line in said] == [
        "lambada/lambada_openai",
        "mmlu/astronomy",
        "mmlu/philosophy",
    ]
    assert not loaded, "all results are there"
    for task in tasks[1:]:
        (mine / task.key(inputs)).unlink()
    assert list(suites._run_tasks(opened, "llama", inputs, tasks)) == said
    assert loaded == [1]


@pytest.mark.parametrize(
    ("version", "error", "said"),
    [
        (None, ImportError, "{host}: [eval] suites need lm-evaluation-harness, which is not installed"),
        ("0.3", ValueError, "lm-evaluation-harness on {host} is 0.3, and {here} where the command was started"),
    ],
)
def test_a_machine_with_another_harness_is_refused_before_a_model_is_loaded(
    evaluated: Path,
    tiny_config: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    error: type[Exception],
    said: str,
) -> None:
    opened, tasks, inputs = planned(evaluated, tiny_config, data)
    here = metadata.version("lm_eval")

    def other(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr("pipeline.evaluation.suites.harness.metadata.version", other)
    monkeypatch.setattr(suites, "load_harness_model", lambda *_, **__: pytest.fail("a model is loaded"))
    assert len(list(suites._run_tasks(opened, "llama", inputs, tasks))) == 3, "results that are there need no harness"
    empty = dataclasses.replace(opened, store=Store(str(tmp_path)))
    with pytest.raises(error) as raised:
        list(suites._run_tasks(empty, "llama", inputs, tasks))
    assert str(raised.value).startswith(said.format(host=socket.gethostname(), here=here))


def test_the_sandbox_that_is_recorded_is_that_of_the_machine_that_runs_the_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = suites.PlannedTask(
        suite=SUITES_BY_NAME["multipl-e"],
        subtask="python",
        num_subtasks=1,
        data=None,
        data_identity="hub",
        num_fewshot=0,
        settings={"harness": metadata.version("lm_eval")},
        sandbox={"has_namespaces": True, "is_read_only": True},
    )
    isolation = SimpleNamespace(has_namespaces=False, is_read_only=True)
    monkeypatch.setattr(suites, "check_language", lambda name: isolation)
    assert suites._checked_here(task).sandbox == {"has_namespaces": False, "is_read_only": True}

    def missing(name: str) -> SimpleNamespace:
        raise LanguageMissingError(f"{name}: there is no python3 on this machine")

    monkeypatch.setattr(suites, "check_language", missing)
    with pytest.raises(LanguageMissingError, match=f"{socket.gethostname()}: python: there is no python3"):
        suites._checked_here(task)


def planned(run: Path, config: Path, data: Path) -> tuple[Run, list[suites.PlannedTask], dict[str, str]]:
    """Return an opened run, its sub-tasks, and what identifies the target."""
    sets = (f"eval.data={str(data)!r}", "eval.suites=['lambada', 'mmlu']")
    opened = open_run(Request(str(config), sets), str(run), Console(quiet=True), local=True)
    tasks = suites.plan_suites(opened.config.eval, opened.console)
    return opened, tasks, suites.model_inputs(opened.resolved.steps["eval/llama"])


def test_other_data_or_limit_is_another_result(evaluated: Path, tiny_config: Path, data: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(evaluated, tmp_path / "run"))
    other = Path(shutil.copytree(data, tmp_path / "data"))
    (other / "lambada_test.jsonl").write_text('{"text": "one word more"}\n{"text": "and another one"}\n')
    evaluate(mine, tiny_config, other, "--suite", "lambada", "--model", "llama")
    evaluate(mine, tiny_config, data, "--suite", "lambada", "--model", "llama", "--limit", "3")
    evaluate(mine, tiny_config, data, "--suite", "lambada", "--model", "neox")
    counts = [json.loads(path.read_text()) for path in mine.glob("suites/lambada/*/*.json")]
    assert sorted((part["model"], part["num_documents"]) for part in counts) == [
        ("fused", 6), ("llama", 2), ("llama", 3), ("llama", 6), ("neox", 6)
    ]  # fmt: skip
    store = Store(str(mine))
    rows = [row for row in suite_rows([recorded_run(store)], store) if row.metric.label == "accuracy"]
    shown = [(row.model, row.num_documents) for row in rows if row.suite == "lambada"]
    assert sorted(shown) == [
        ("after tiny", 6), ("source neox", 6), *(("target llama before", count) for count in (2, 3, 6))
    ]  # fmt: skip


def test_folder_of_the_environment_is_used(
    run: Path, tiny_config: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("suites")))
    shutil.copytree(data, tmp_path / "shared" / "eval")
    monkeypatch.setenv("PTAFUSE_DATA", str(tmp_path / "shared"))
    evaluate(mine, tiny_config, None, "--suite", "mmlu/philosophy", "--model", "llama")
    assert set(results(mine)) == {("mmlu/philosophy", "llama")}


def test_report_pools_sub_tasks_and_pairs_documents(evaluated: Path) -> None:
    store = Store(str(evaluated))
    listed = suite_rows([recorded_run(store)], store)
    rows = {(row.suite, row.metric.label, row.model): row for row in listed}
    found = results(evaluated)

    def values(model: str, key: str, *tasks: str) -> list[np.ndarray]:
        return [np.array(found[task, model]["documents"][key]) for task in tasks]

    before, after = (values(model, "perplexity,none", "lambada/lambada_openai") for model in ("llama", "fused"))
    shown = rows["lambada", "perplexity", "after tiny"]
    assert shown.figure == pytest.approx(figure(after, "perplexity"))
    assert shown.against_before == pytest.approx(difference(after, before, "perplexity"))
    assert rows["lambada", "perplexity", "target llama before"].against_before is None
    accuracies = [row for row in listed if row.suite == "mmlu"]
    assert {row.subtasks for row in accuracies} == {("astronomy",), ("philosophy",)}  # 5-shot is not mixed with 0-shot
    assert {row.num_subtasks for row in accuracies} == {57}


def test_report_shows_figures_and_errors(evaluated: Path) -> None:
    shown = ptafuse("report", str(evaluated)).stdout
    assert "1 of 57" in shown
    page = report_page(Store(str(evaluated)), max_positions=50)
    section = page.split('<section id="benchmarks">')[1].split("</section>")[0]
    store = Store(str(evaluated))
    for row in suite_rows([recorded_run(store)], store):
        assert row.model in section
        scale = 1 if row.metric.kind == "perplexity" else 100
        assert f"± {scale * row.figure.error:.{2 if scale == 1 else 1}f}" in section


def test_report_of_a_run_without_suites_says_how_to_get_them(undisturbed_run: Path) -> None:
    page = report_page(Store(str(undisturbed_run)), max_positions=50)
    assert "No benchmark has been run here" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "multipl-e"), "the suite multipl-e runs programs written by models: allow it with --execute-code"),
        (("--suite", "multipl-e/rs", "--execute-code"), "multipl-e/rs is not in"),
        (("--suite", "mmlu/astrology"), "mmlu/astrology is not in"),
        (("--suite", "arc"), "unknown suite 'arc'; known: gsm8k"),
        (("--suite", "mmlu", "--model", "gpt"), "this run has no model 'gpt'; its models: llama, neox, fused"),
        (("--suite", "mmlu", "--set", "eval.data=/nowhere"), "the folder /nowhere does not exist"),
        (
            ("--suite", "mmlu", "--apply-chat-template"),
            "eval.apply_chat_template: the tokenizer of llama has no chat template: exclude llama with eval.suite_models",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_computed(
    run: Path, tiny_config: Path, data: Path, arguments: tuple[str, ...], message: str
) -> None:
    refused = evaluate(run, tiny_config, data, *arguments, check=False)
    assert refused.returncode == 1
    assert message in refused.stderr


def test_missing_file_is_refused_with_what_was_expected(run: Path, tiny_config: Path, tmp_path: Path) -> None:
    refused = evaluate(run, tiny_config, tmp_path, "--suite", "toxigen", check=False)
    assert f"{tmp_path} has no data for the suite toxigen: expected toxigen_test.jsonl there" in refused.stderr


def test_missing_harness_is_refused_with_what_to_install(
    run: Path, tiny_config: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = metadata.version

    def version(name: str) -> str:
        if name == "lm_eval":
            raise metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr("pipeline.evaluation.suites.harness.metadata.version", version)
    refused = evaluate(run, tiny_config, data, "--suite", "mmlu", check=False)
    assert refused.returncode == 1
    assert "make eval SUITES=" in refused.stderr


def test_programs_are_run_when_that_is_allowed(evaluated: Path, tiny_config: Path, data: Path) -> None:
    done = evaluate(
        evaluated, tiny_config, data, "--suite", "multipl-e/py", "--model", "llama", "--limit", "1", "--execute-code"
    )
    assert "multipl-e/py of llama: pass@1 0.0000" in done.stdout
    (path,) = evaluated.glob("suites/multipl-e/py/*.json")
    sandbox = json.loads(path.read_text())["sandbox"]
    assert set(sandbox) == {"has_namespaces", "is_read_only"}
