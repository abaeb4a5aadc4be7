"""Files of every suite in miniature, in the formats of the real ones."""

import csv
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.tiny_tokenizers import TEXTS

GSM8K = [
    {"question": "A hen lays 3 eggs a day. How many in 4 days?", "answer": "3 * 4 = <<3*4=12>>12.\n#### 12"},
    {"question": "Tom has 1,200 dollars and spends 200. What is left?", "answer": "1200 - 200 = 1000.\n#### 1,000"},
]
BBH = {
    "boolean_expressions": [
        {"input": "not ( True ) and ( True ) is", "target": "False"},
        {"input": "True or False is", "target": "True"},
    ],
    "navigate": [{"input": "Take 1 step. Do you return?", "target": "No"}],
}
TYDIQA = {
    "english": (
        "Where is the Eiffel Tower?",
        "The Eiffel Tower is in the city of Paris.",
        ["the city of Paris", "Paris"],
    ),
    "arabic": ("أين باريس؟", "باريس في فرنسا.", ["فرنسا"]),
}
TOXIGEN = [
    {"text": "they are all kind people", "toxicity_ai": 1.0, "toxicity_human": 1.0},
    {"text": "they should go away", "toxicity_ai": 4.0, "toxicity_human": 5.0},
]
HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'def double(number):\n    """Twice the number."""\n',
        "entry_point": "double",
        "canonical_solution": "    return 2 * number\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    },
    {
        "task_id": "HumanEval/1",
        "prompt": "def first(items):\n",
        "entry_point": "first",
        "canonical_solution": "    return items[0]\n",
        "test": "def check(candidate):\n    assert candidate([7, 8]) == 7\n",
    },
]
MULTIPL_E_SH = [
    {
        "name": "HumanEval_0_double",
        "language": "sh",
        "prompt": "#!/bin/bash\n# Twice the number.\ndouble() {\n",
        "tests": '}\ncandidate() {\n  double "$@"\n}\nset -e\nrun_test() {\n  [[ $(candidate 2) = 4 ]]\n}\nrun_test',
        "stop_tokens": ["\n}"],
    }
]
SUBJECTS = ("astronomy", "philosophy")


def mmlu_rows(subject: str, count: int) -> list[dict[str, object]]:
    """Questions with answers of several letters; what they say does not matter."""
    words = [text.split()[0] for text in TEXTS]
    return [
        {
            "question": f"{subject}, question {number}: which of {words[number % len(words)]}?",
            **{f"choice{index}": words[(number + index) % len(words)] for index in range(4)},
            "answer": (number * 3 + len(subject)) % 4,
        }
        for number in range(count)
    ]


def save_data(folder: Path, lambada: Sequence[str] = TEXTS[:6]) -> Path:
    """Write all of it; returns the folder."""
    _lines(folder / "gsm8k_test.jsonl", GSM8K)
    _lines(folder / "lambada_test.jsonl", [{"text": text} for text in lambada])
    _lines(folder / "toxigen_test.jsonl", TOXIGEN)
    _lines(folder / "multipl-e" / "humaneval-sh.jsonl", MULTIPL_E_SH)
    _lines(folder / "HumanEval.jsonl", HUMANEVAL)
    raw = (folder / "HumanEval.jsonl").read_bytes()
    (folder / "HumanEval.jsonl").unlink()
    (folder / "HumanEval.jsonl.gz").write_bytes(gzip.compress(raw))
    for name, examples in BBH.items():
        _write(folder / "bbh" / f"{name}.json", json.dumps({"canary": "do not train on this", "examples": examples}))
    for subject in SUBJECTS:
        _table(folder / "mmlu" / f"{subject}_test.csv", mmlu_rows(subject, 6))
    _table(folder / "mmlu" / "astronomy_dev.csv", mmlu_rows("examples", 5))
    for language, (question, context, answers) in TYDIQA.items():
        asked = {
            "id": f"{language}-1-1",
            "question": question,
            "answers": [{"text": text, "answer_start": 0} for text in answers],
        }
        article = {
            "title": "t",
            "paragraphs": [{"context": context, "qas": [asked, {**asked, "id": f"{language}-1-2"}]}],
        }
        _write(folder / "tydiqa" / f"{language}_tydiqa_dev.json", json.dumps({"data": [article]}, ensure_ascii=False))
    return folder


def _lines(path: Path, rows: Sequence[Mapping]) -> None:
    _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _table(path: Path, rows: Sequence[Mapping]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
