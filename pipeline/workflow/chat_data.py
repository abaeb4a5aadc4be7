"""The conversations of ``make demo-chat``: questions about Python, and what its documentation and docstrings answer.

Everything is in the Python that runs this (PSF licence), so nothing is downloaded, and the text depends on its version.
Source files are parsed, not imported: a module of the standard library may do something when it is imported.
"""

import ast
import json
import logging
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

from stages.contract.digest import sha256

logger = logging.getLogger(__name__)

CONVERSATIONS: Final = "questions.jsonl"
GEMMA_TEMPLATE: Final = "gemma.jinja"
"""Base models have no chat template, and the demo's source is one."""
MIN_CHARACTERS: Final = 60
MAX_CHARACTERS: Final = 500
"""Largest size of an answer. Paragraphs of a docstring are taken while they fit; if the first does not, it is left out."""
MAX_METHODS: Final = 2
"""Further questions about a class, so that some conversations have several turns."""
_LEFT_OUT: Final = frozenset({"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"})


@dataclass(frozen=True)
class Exchange:
    """A question and its answer."""

    question: str
    answer: str


def prepare_conversations(folder: Path) -> None:
    """Write the demo's conversations and the chat template of its source into ``folder``; keep existing files."""
    folder.mkdir(parents=True, exist_ok=True)
    template = folder / GEMMA_TEMPLATE
    if not template.exists():
        shipped = resources.files("pipeline").joinpath("configs", "chat_templates", GEMMA_TEMPLATE)
        _write(template, shipped.read_text(encoding="utf-8"))
    final = folder / CONVERSATIONS
    if final.exists():
        return
    lines = [
        json.dumps({"messages": _messages(turns), "kind": kind}, ensure_ascii=False) + "\n"
        for kind, turns in python_conversations()
    ]
    _write(final, "".join(lines))
    logger.info("%s: %d conversations about Python %s", final, len(lines), sysconfig.get_python_version())


def python_conversations() -> list[tuple[str, list[Exchange]]]:
    """Return every conversation with its kind (``topic``, ``function`` or ``class``).

    The order is that of the hashes of the first questions, so the first few are a fair sample of all.
    """
    conversations: dict[str, tuple[str, list[Exchange]]] = {}
    for kind, turns in [*_topics(), *_docstrings(Path(sysconfig.get_path("stdlib")))]:
        conversations.setdefault(turns[0].question, (kind, turns))  # a name that is defined twice is asked for once
    return [conversations[question] for question in sorted(conversations, key=lambda text: sha256(text.encode()))]


def _topics() -> Iterator[tuple[str, list[Exchange]]]:
    """Yield questions that the topics of Python's own documentation answer."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        title, _, text = str(topics[name]).strip().partition("\n")
        underline, _, text = text.partition("\n")
        answer = shorten_answer(text) if set(underline.strip()) <= set("*=-") else None
        if answer is not None:
            yield (
                "topic",
                [Exchange(f"Python's documentation has a section named “{title.strip()}”. What does it say?", answer)],
            )


def _docstrings(library: Path) -> Iterator[tuple[str, list[Exchange]]]:
    """Yield questions that docstrings of public functions, classes and their methods answer."""
    for path in sorted(library.rglob("*.py")):
        names = path.relative_to(library).with_suffix("").parts
        if _LEFT_OUT.intersection(names) or any(name.startswith("_") and name != "__init__" for name in names):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # a few files are templates, or broken on purpose
            continue
        module = ".".join(name for name in names if name != "__init__")
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and (answer := _answer(node)) is not None:
                yield (
                    "function",
                    [Exchange(f"What does the function `{node.name}` of Python's module `{module}` do?", answer)],
                )
            elif isinstance(node, ast.ClassDef) and (answer := _answer(node)) is not None:
                first = Exchange(f"What is the class `{node.name}` of Python's module `{module}`?", answer)
                yield "class", [first, *_methods(node)]


def _methods(node: ast.ClassDef) -> list[Exchange]:
    answers = {
        method.name: answer
        for method in node.body
        if isinstance(method, ast.FunctionDef) and (answer := _answer(method)) is not None
    }
    return [
        Exchange(f"And what does its method `{name}` do?", answer)
        for name, answer in list(answers.items())[:MAX_METHODS]
    ]


def _answer(node: ast.FunctionDef | ast.ClassDef) -> str | None:
    """Return what a public definition's docstring says; None where it has none, or one of another length."""
    docstring = ast.get_docstring(node)
    return None if docstring is None or node.name.startswith("_") else shorten_answer(docstring)


def shorten_answer(text: str) -> str | None:
    """Return the first paragraphs of a text, up to ``MAX_CHARACTERS``; None where they are too long or say too little."""
    answer = ""
    for paragraph in text.strip().split("\n\n"):
        longer = f"{answer}\n\n{paragraph.rstrip()}" if answer else paragraph.rstrip()
        if len(longer) > MAX_CHARACTERS:
            break
        answer = longer
    paragraphs = answer.split("\n\n")
    while paragraphs and paragraphs[-1].endswith(":"):  # announces what did not fit
        paragraphs.pop()
    answer = "\n\n".join(paragraphs)
    return answer if len(answer) >= MIN_CHARACTERS and not answer.startswith(">>>") else None


def _messages(turns: list[Exchange]) -> list[dict[str, Any]]:
    roles = (("user", "question"), ("assistant", "answer"))
    return [{"role": role, "content": getattr(turn, field)} for turn in turns for role, field in roles]


def _write(path: Path, text: str) -> None:
    """Write a file whole, or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
