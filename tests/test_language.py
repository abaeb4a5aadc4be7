"""Docstrings and comments keep to the measures of ``tests/language.py``."""

import pytest

from tests.language import (
    COMMENTED,
    LEAST_COMMENTS,
    MOST_NOT_IMPERATIVE,
    PACKAGES,
    comments_per_100_lines,
    count_comments,
    is_imperative,
    not_imperative,
    python_files,
)


def test_function_docstrings_are_imperative_sentences() -> None:
    places, total = not_imperative(python_files(*PACKAGES))
    assert len(places) <= MOST_NOT_IMPERATIVE * total, "\n".join(places)


@pytest.mark.parametrize("package", COMMENTED)
def test_kernels_and_training_loop_have_comments(package: str) -> None:
    assert comments_per_100_lines(package) >= LEAST_COMMENTS


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the rows.", True),
        ("``auto`` is a GPU.", True),
        ("The rows.", False),
        ("What a row says.", False),
        ("(N,) bool: the row is present.", False),
    ],
)
def test_imperative_sentences_are_recognised_by_their_first_word(docstring: str, expected: bool) -> None:
    assert is_imperative(docstring) is expected


def test_docstrings_blank_lines_and_pragmas_are_neither_comments_nor_code() -> None:
    source = '"""Text.\n\nMore."""\n\n# A reason.\nx = 1  # type: ignore\n'
    source += 'y = """\n# a string\n"""\n\n\ndef f():\n    """Do."""\n'
    assert count_comments(source) == (1, 5)
