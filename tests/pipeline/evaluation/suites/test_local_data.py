"""The suites' local files become documents; wrong ones are refused with their place."""

from pathlib import Path

import pytest

from pipeline.evaluation.suites.catalogue import SUITES, selected
from pipeline.evaluation.suites.local_data import EXPECTED, local_tasks
from tests.pipeline.evaluation.suites.tiny_data import BBH, GSM8K, HUMANEVAL, TYDIQA, save_data
from train.config import SUITE_NAMES, EvalConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_data(tmp_path_factory.mktemp("data"))


def test_every_suite_of_the_configuration_is_known_everywhere() -> None:
    assert set(SUITE_NAMES) == set(SUITES) == set(EXPECTED)


def test_suites_are_selected_whole_or_by_sub_task() -> None:
    assert selected(("bbh/navigate", "mmlu", "bbh/snarks")) == {"bbh": ("navigate", "snarks"), "mmlu": None}
    assert selected(("bbh/navigate", "bbh")) == selected(("bbh", "bbh/navigate")) == {"bbh": None}


def test_unknown_suite_is_refused_in_the_configuration() -> None:
    with pytest.raises(ValueError, match="unknown suite 'arc'; known: gsm8k"):
        EvalConfig(suites=("mmlu", "arc"))


def test_files_become_documents(folder: Path) -> None:
    assert local_tasks("gsm8k", folder)["gsm8k_cot"].read() == {"test": GSM8K}
    assert {name: task.read()["test"] for name, task in local_tasks("bbh", folder).items()} == BBH
    mmlu = local_tasks("mmlu", folder)
    assert {name: {split: len(rows) for split, rows in task.read().items()} for name, task in mmlu.items()} == {
        "astronomy": {"test": 6, "dev": 5},
        "philosophy": {"test": 6},
    }
    first = mmlu["astronomy"].read()["test"][0]
    assert len(first["choices"]) == 4
    assert first["answer"] in range(4)
    tydiqa = local_tasks("tydiqa", folder)
    assert set(tydiqa) == {"ar", "en"}
    assert tydiqa["en"].read()["validation"][1] == {
        "id": "english-1-2",
        "title": "t",
        "context": TYDIQA["english"][1],
        "question": TYDIQA["english"][0],
        "answers": TYDIQA["english"][2],
    }
    code = local_tasks("multipl-e", folder)
    assert set(code) == {"py", "sh"}
    assert code["py"].read()["test"][0]["tests"] == HUMANEVAL[0]["test"] + "\ncheck(double)"


def test_identity_changes_with_any_file(folder: Path, tmp_path: Path) -> None:
    other = save_data(tmp_path)
    before = local_tasks("mmlu", folder)["astronomy"].identity()
    assert local_tasks("mmlu", other)["astronomy"].identity() == before
    path = other / "mmlu" / "astronomy_dev.csv"
    path.write_text(path.read_text().replace("question 0", "question zero"))
    assert local_tasks("mmlu", other)["astronomy"].identity() != before


def test_missing_data_is_refused_with_what_was_expected(tmp_path: Path) -> None:
    for suite, expected in EXPECTED.items():
        with pytest.raises(FileNotFoundError) as refused:
            local_tasks(suite, tmp_path)
        assert expected in str(refused.value)


@pytest.mark.parametrize(
    ("suite", "subtask", "name", "text", "message"),
    [
        ("lambada", "lambada_openai", "lambada_test.jsonl", '{"words": "x"}\n', r"document 0: 'text'"),
        ("lambada", "lambada_openai", "lambada_test.jsonl", "", "it contains no documents"),
        ("bbh", "navigate", "bbh/navigate.json", '{"rows": []}', "it contains no documents"),
        ("bbh", "navigate", "bbh/navigate.json", "[]", "expected one JSON object, found a list"),
        (
            "mmlu",
            "astronomy",
            "mmlu/astronomy_test.csv",
            "question,choice0,choice1,choice2,choice3,answer\nq,a,b,c,d,B\n",
            "answer is 'B', expected 0, 1, 2 or 3",
        ),
    ],
)
def test_wrong_file_is_refused_with_its_place(
    tmp_path: Path, suite: str, subtask: str, name: str, text: str, message: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        local_tasks(suite, tmp_path)[subtask].read()
    assert str(path) in str(refused.value)


def test_unknown_language_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tydiqa").mkdir()
    (tmp_path / "tydiqa" / "german_tydiqa_dev.json").write_text("{}")
    with pytest.raises(ValueError, match="expected one of the languages arabic"):
        local_tasks("tydiqa", tmp_path)
