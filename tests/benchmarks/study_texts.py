"""The texts of docs/study.md beside the news articles, made from ``text/mixed.jsonl`` of ``PTAFUSE_DATA``.

``python -m tests.benchmarks.study_texts study-data`` writes JSON Lines with the columns ``text`` and ``kind``. No document
stands in two of the files, but for a kind that has a single one, which is halved.

=====================  ================================================================================================
``choose.jsonl``       every second document of all 18 kinds: settings are chosen on it
``report.jsonl``       the other documents: the tables are of it
``mixed.jsonl``        excerpts of half of the kinds that have many documents, as many of each: the mixed text to learn
``left-choose.jsonl``  of ``choose.jsonl``, the kinds that ``mixed.jsonl`` leaves out
``left-report.jsonl``  of ``report.jsonl``, likewise
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

LEARNT_DOCUMENTS: Final = 10
"""Excerpts of each kind that is learnt; a kind of fewer documents is left out."""
LEARNT_BYTES: Final = 2500
"""Of an excerpt, from its document's beginning: as much of every kind, whatever its script."""


@dataclass(frozen=True)
class Document:
    """A document of a kind."""

    text: str
    kind: str


def split_documents(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Deal each kind's documents out in turn; a kind's only document is cut in half."""
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


def learnt_kinds(documents: list[Document]) -> list[str]:
    """Every second kind, by alphabet, of those that have enough documents."""
    kinds = sorted({document.kind for document in documents})
    enough = [kind for kind in kinds if sum(document.kind == kind for document in documents) >= LEARNT_DOCUMENTS]
    return enough[::2]


def excerpts(documents: list[Document], kind: str) -> list[Document]:
    """Return the beginnings of a kind's first documents."""
    own = [document for document in documents if document.kind == kind][:LEARNT_DOCUMENTS]
    cut = [document.text.encode()[:LEARNT_BYTES].decode(errors="ignore") for document in own]
    return [Document(text, kind) for text in cut]


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
    learnt = learnt_kinds(documents)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "choose.jsonl", choose)
    _write(folder / "report.jsonl", report)
    _write(folder / "mixed.jsonl", [part for kind in learnt for part in excerpts(documents, kind)])
    _write(folder / "left-choose.jsonl", [part for part in choose if part.kind not in learnt])
    _write(folder / "left-report.jsonl", [part for part in report if part.kind not in learnt])
    say(f"learnt in mixed.jsonl: {', '.join(learnt)}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("expected one argument, the folder to write: python -m tests.benchmarks.study_texts study-data")
    try:
        main(Path(sys.argv[1]))
    except SkippedError as error:
        sys.exit(str(error))
