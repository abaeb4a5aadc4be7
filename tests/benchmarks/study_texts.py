"""Texts of docs/study.md other than the news articles, made from ``text/mixed.jsonl`` of ``PTAFUSE_DATA``.

``python -m tests.benchmarks.study_texts study-data`` writes JSON Lines with the columns ``text`` and ``kind``. The two files
``choose.jsonl`` and ``report.jsonl`` share no document, but a kind with a single document has half of it in each.

=====================  ================================================================================================
``choose.jsonl``       every second document of all 18 kinds: settings are chosen on it
``report.jsonl``       the other documents: the tables report on it
``mixed.jsonl``        excerpts of half of the kinds with many documents, equally many of each: the mixed training text
``left-choose.jsonl``  documents of ``choose.jsonl`` of the kinds that are not in ``mixed.jsonl``
``left-report.jsonl``  documents of ``report.jsonl`` of the kinds that are not in ``mixed.jsonl``
``docs.jsonl``         beginnings of the topics of Python's documentation, which every Python installation carries
``docs-whole.jsonl``   the same topics whole: 2.5 times as many tokens
=====================  ================================================================================================
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.benchmarks.align_data import data_folder
from tests.benchmarks.measure import SkippedError, say

TRAINING_DOCUMENTS: Final = 10
"""Number of excerpts of each kind to train on; kinds with fewer documents are left out."""
TRAINING_BYTES: Final = 2500
"""Length of an excerpt, from the beginning of its document: the same for every kind, whatever its script."""
TOPIC_CHARACTERS: Final = 5000
"""Length of a topic of Python's documentation, from its beginning: a few are ten times as long as the others."""


@dataclass(frozen=True)
class Document:
    """A document and its kind."""

    text: str
    kind: str


def split_documents(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Split each kind's documents alternately; cut a kind's only document in half."""
    choose: list[Document] = []
    report: list[Document] = []
    for kind in dict.fromkeys(document.kind for document in documents):
        own = [document for document in documents if document.kind == kind]
        if len(own) == 1:
            text = own[0].text
            own = [Document(text[: len(text) // 2], kind), Document(text[len(text) // 2 :], kind)]
        choose += own[::2]
        report += own[1::2]
    return choose, report


def training_kinds(documents: list[Document]) -> list[str]:
    """Return every second kind, in alphabetical order, of those that have enough documents."""
    kinds = sorted({document.kind for document in documents})
    enough = [kind for kind in kinds if sum(document.kind == kind for document in documents) >= TRAINING_DOCUMENTS]
    return enough[::2]


def excerpts(documents: list[Document], kind: str) -> list[Document]:
    """Return the beginnings of a kind's first documents."""
    own = [document for document in documents if document.kind == kind][:TRAINING_DOCUMENTS]
    cut = [document.text.encode()[:TRAINING_BYTES].decode(errors="ignore") for document in own]
    return [Document(text, kind) for text in cut]


def documentation(max_characters: int | None) -> list[Document]:
    """Return the topics of Python's documentation, or their beginnings, without repeated ones."""
    from pydoc_data.topics import topics

    texts = dict.fromkeys(text[:max_characters] for _, text in sorted(topics.items()))
    return [Document(text, "documentation") for text in texts]


def _write(path: Path, documents: Iterable[Document]) -> None:
    lines = [json.dumps({"text": document.text, "kind": document.kind}, ensure_ascii=False) for document in documents]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    say(f"{path}: {len(lines)} documents")


def main(folder: Path) -> None:
    """Write all files.

    Raises:
        SkippedError: ``PTAFUSE_DATA`` names no folder.
    """
    lines = (data_folder() / "text" / "mixed.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    documents = [Document(record["text"], record["source"]) for record in records]
    choose, report = split_documents(documents)
    trained_kinds = training_kinds(documents)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "choose.jsonl", choose)
    _write(folder / "report.jsonl", report)
    _write(folder / "mixed.jsonl", [part for kind in trained_kinds for part in excerpts(documents, kind)])
    _write(folder / "left-choose.jsonl", [part for part in choose if part.kind not in trained_kinds])
    _write(folder / "left-report.jsonl", [part for part in report if part.kind not in trained_kinds])
    _write(folder / "docs.jsonl", documentation(TOPIC_CHARACTERS))
    _write(folder / "docs-whole.jsonl", documentation(None))
    say(f"kinds to train on in mixed.jsonl: {', '.join(trained_kinds)}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("expected one argument, the folder to write: python -m tests.benchmarks.study_texts study-data")
    try:
        main(Path(sys.argv[1]))
    except SkippedError as error:
        sys.exit(str(error))
