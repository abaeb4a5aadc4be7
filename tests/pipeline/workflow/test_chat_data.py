"""The conversations of ``make demo-chat``: made of this Python, the same twice, and ready to be read by a run."""

import json
from pathlib import Path

import jinja2
import pytest

from pipeline.workflow import chat_data
from pipeline.workflow.chat_data import MAX_CHARACTERS, prepare_conversations, python_conversations, shorten_answer

SOURCE = '''
import os

def read_all(path):
    """Read the whole file that ``path`` names, and return what it holds as text.

    A second paragraph.
    """

def _hidden(path):
    """Read the whole file that ``path`` names, and return what it holds as text."""

def terse():
    """Short."""

class Reader:
    """A reader of files, which remembers how far it has read in each of them."""

    def rewind(self):
        """Go back to the beginning of the file, so that the next read begins there."""

    def __enter__(self):
        """Begin to read the file, and promise to close it when the block is left."""

class Bare:
    def rewind(self):
        """Go back to the beginning of the file, so that the next read begins there."""
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "lib"
    for name in ("files.py", "_private.py", "package/__init__.py", "test/files.py", "site-packages/other.py"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SOURCE if name != "package/__init__.py" else "def broken(:\n")
    monkeypatch.setattr(chat_data.sysconfig, "get_path", lambda _: str(folder))
    return folder


def test_docstrings_of_public_names_become_questions_and_answers(library: Path) -> None:
    found = [(kind, turns) for kind, turns in python_conversations() if kind != "topic"]
    assert sorted(kind for kind, _ in found) == ["class", "function"]
    turns = dict(found)
    assert turns["function"][0].question == "What does the function `read_all` of Python's module `files` do?"
    assert turns["function"][0].answer.endswith("as text.\n\nA second paragraph.")
    assert [turn.question for turn in turns["class"]] == [
        "What is the class `Reader` of Python's module `files`?",
        "And what does its method `rewind` do?",
    ]


def test_topics_of_the_documentation_are_asked_for_by_their_titles(library: Path) -> None:
    topics = [turns[0] for kind, turns in python_conversations() if kind == "topic"]
    assert len(topics) >= 30
    [asserting] = [turn for turn in topics if '“The "assert" statement”' in turn.question]
    assert asserting.answer.startswith("Assert statements are a convenient way")
    assert not any("****" in turn.answer for turn in topics)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x" * 60, "x" * 60),
        ("x" * 59, None),
        ("x" * (MAX_CHARACTERS + 1), None),
        ("x" * 60 + "\n\n" + "y" * MAX_CHARACTERS, "x" * 60),
        ("x" * 60 + "\n\nArguments:\n\n" + "y" * MAX_CHARACTERS, "x" * 60),
        (">>> " + "x" * 60, None),
        ("", None),
    ],
)
def test_an_answer_is_whole_paragraphs_that_fit(text: str, expected: str | None) -> None:
    assert shorten_answer(text) == expected


def test_the_file_holds_alternating_turns_and_is_written_once(library: Path, tmp_path: Path) -> None:
    prepare_conversations(tmp_path / "data")
    final = tmp_path / "data" / chat_data.CONVERSATIONS
    rows = [json.loads(line) for line in final.read_text(encoding="utf-8").split("\n")[:-1]]
    assert len(rows) > 30
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in row["messages"])
    before = final.read_bytes()
    final.write_bytes(b"mine\n")
    prepare_conversations(tmp_path / "data")
    assert final.read_bytes() == b"mine\n", "what is there is left alone"
    final.unlink()
    prepare_conversations(tmp_path / "data")
    assert final.read_bytes() == before


def test_the_shipped_template_is_gemmas(library: Path, tmp_path: Path) -> None:
    prepare_conversations(tmp_path)
    template = jinja2.Environment().from_string((tmp_path / chat_data.GEMMA_TEMPLATE).read_text(encoding="utf-8"))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " Yes\n"},
    ]
    assert template.render(messages=messages, bos_token="<bos>", add_generation_prompt=False) == (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n Yes\n<end_of_turn>\n"
    )
    assert template.render(messages=messages[1:2], bos_token="<bos>", add_generation_prompt=True) == (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    )
