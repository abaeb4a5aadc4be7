"""Data of the suites in a local folder: which files are expected, and how they become documents."""

import csv
import gzip
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from stages.contract.digest import cached_file_sha256

Document = dict[str, Any]


@dataclass(frozen=True)
class LocalTask:
    """A sub-task whose data lies here.

    Attributes:
        subtask: name of the sub-task.
        files: files that are read.
        read: gives split -> documents, as the harness's task file (or ours) expects them.
    """

    subtask: str
    files: tuple[Path, ...]
    read: Callable[[], Mapping[str, list[Document]]]

    def identity(self) -> str:
        """Return the hash of the data's files."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name}:{cached_file_sha256(file)}\n".encode())
        return f"sha256:{digest.hexdigest()}"


def local_tasks(suite: str, folder: Path) -> dict[str, LocalTask]:
    """Find the sub-tasks of a suite that a folder has files for, by name.

    Raises:
        FileNotFoundError: it has none; says what was expected.
    """
    tasks = {task.subtask: task for task in _FINDERS[suite](folder)}
    if not tasks:
        raise FileNotFoundError(
            f"{folder} has no data for the suite {suite}: expected {EXPECTED[suite]} there. Without `eval.data` (and "
            "without the variable PTAFUSE_DATA) the data is fetched from the Hugging Face hub"
        )
    return tasks


EXPECTED: Final = {
    "gsm8k": "gsm8k_test.jsonl",
    "bbh": "bbh/<sub-task>.json",
    "multipl-e": "HumanEval.jsonl[.gz] (Python) or multipl-e/humaneval-<language>.jsonl[.gz]",
    "mmlu": "mmlu/<subject>_test.csv (and <subject>_dev.csv for the examples)",
    "toxigen": "toxigen_test.jsonl",
    "tydiqa": "tydiqa/<language>_tydiqa_dev.json",
    "lambada": "lambada_test.jsonl",
}
"""Suite -> the files that ``eval.data`` may hold of it."""

TYDIQA_LANGUAGES: Final = {
    "arabic": "ar",
    "bengali": "bn",
    "english": "en",
    "finnish": "fi",
    "indonesian": "id",
    "korean": "ko",
    "russian": "ru",
    "swahili": "sw",
    "telugu": "te",
}
"""Languages of the gold passage task: their names in its files -> in the harness."""


# --- one function a format ------------------------------------------------------------------------------------------


def _one_file(subtask: str, name: str, columns: Sequence[str]) -> Callable[[Path], list[LocalTask]]:
    def find(folder: Path) -> list[LocalTask]:
        file = folder / name
        if not file.is_file():
            return []
        return [LocalTask(subtask, (file,), lambda: {"test": _json_lines(file, columns)})]

    return find


def _bbh(folder: Path) -> list[LocalTask]:
    def task(file: Path) -> LocalTask:
        return LocalTask(
            file.stem, (file,), lambda: {"test": _rows(file, _json(file).get("examples"), ("input", "target"))}
        )

    return [task(file) for file in sorted(folder.glob("bbh/*.json"))]


def _mmlu(folder: Path) -> list[LocalTask]:
    def task(test: Path) -> LocalTask:
        subject = test.name.removesuffix("_test.csv")
        splits = {"test": test, "dev": test.with_name(f"{subject}_dev.csv")}
        present = {split: file for split, file in splits.items() if file.is_file()}
        return LocalTask(
            subject, tuple(present.values()), lambda: {split: _mmlu_rows(file) for split, file in present.items()}
        )

    return [task(test) for test in sorted(folder.glob("mmlu/*_test.csv"))]


def _tydiqa(folder: Path) -> list[LocalTask]:
    def task(file: Path) -> LocalTask:
        language = file.name.removesuffix("_tydiqa_dev.json")
        if language not in TYDIQA_LANGUAGES:
            raise ValueError(f"{file}: expected one of the languages {', '.join(TYDIQA_LANGUAGES)} in its name")
        return LocalTask(TYDIQA_LANGUAGES[language], (file,), lambda: {"validation": _squad_rows(file)})

    return [task(file) for file in sorted(folder.glob("tydiqa/*_tydiqa_dev.json"))]


def _multipl_e(folder: Path) -> list[LocalTask]:
    def humaneval(file: Path) -> LocalTask:
        columns = ("prompt", "entry_point", "test")
        return LocalTask("py", (file,), lambda: {"test": [as_multipl_e(row) for row in _json_lines(file, columns)]})

    def translated(file: Path) -> LocalTask:
        language = file.name.removeprefix("humaneval-").split(".", 1)[0]
        columns = ("prompt", "tests", "stop_tokens")
        return LocalTask(language, (file,), lambda: {"test": _json_lines(file, columns)})

    python = [humaneval(file) for file in sorted(folder.glob("HumanEval.jsonl*"))[:1]]
    return python + [translated(file) for file in sorted(folder.glob("multipl-e/humaneval-*.jsonl*"))]


def as_multipl_e(row: Document) -> Document:
    """Convert a HumanEval problem to MultiPL-E's columns; a completion ends as in the harness's task `humaneval`."""
    return {
        "prompt": row["prompt"],
        "tests": f"{row['test']}\ncheck({row['entry_point']})",
        "stop_tokens": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
    }


_FINDERS: Final[dict[str, Callable[[Path], list[LocalTask]]]] = {
    "gsm8k": _one_file("gsm8k_cot", "gsm8k_test.jsonl", ("question", "answer")),
    "bbh": _bbh,
    "multipl-e": _multipl_e,
    "mmlu": _mmlu,
    "toxigen": _one_file("toxigen", "toxigen_test.jsonl", ("text", "toxicity_ai", "toxicity_human")),
    "tydiqa": _tydiqa,
    "lambada": _one_file("lambada_openai", "lambada_test.jsonl", ("text",)),
}


def _mmlu_rows(file: Path) -> list[Document]:
    columns = ("question", "choice0", "choice1", "choice2", "choice3", "answer")
    with file.open(encoding="utf-8", newline="") as lines:
        rows = _rows(file, list(csv.DictReader(lines)), columns)
    for number, row in enumerate(rows):
        if row["answer"] not in ("0", "1", "2", "3"):
            raise ValueError(f"{file}, row {number}: answer is {row['answer']!r}, expected 0, 1, 2 or 3")
    return [
        {
            "question": row["question"],
            "choices": [row[f"choice{index}"] for index in range(4)],
            "answer": int(row["answer"]),
        }
        for row in rows
    ]


def _squad_rows(file: Path) -> list[Document]:
    """Read the questions of a file in SQuAD's format, in the form that the harness's own reader produces."""
    return [
        {
            "id": question["id"],
            "title": article.get("title", ""),
            "context": paragraph["context"],
            "question": question["question"],
            "answers": [answer["text"] for answer in question["answers"]],
        }
        for article in _json(file).get("data") or ()
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def _json(file: Path) -> dict[str, Any]:
    with file.open(encoding="utf-8") as stream:
        value = json.load(stream)
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected one JSON object, found a {type(value).__name__}")  # noqa: TRY004  # the file's fault
    return value


def _json_lines(file: Path, columns: Sequence[str]) -> list[Document]:
    raw = file.read_bytes()
    lines = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8").split("\n")
    return _rows(file, [json.loads(line) for line in lines if line.strip()], columns)


def _rows(file: Path, rows: Sequence[Mapping[str, Any]] | None, columns: Sequence[str]) -> list[Document]:
    if not rows:
        raise ValueError(f"{file}: it contains no documents")
    for number, row in enumerate(rows):
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            raise ValueError(f"{file}, document {number}: {missing[0]!r} is missing, expected {', '.join(columns)}")
    return [{column: row[column] for column in columns} for row in rows]
