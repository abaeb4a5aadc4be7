"""Measure the language of the code: ``python -m tests.language`` prints the figures, ``test_language.py`` checks them."""

import ast
import io
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PACKAGES: Final = ("stages", "train", "pipeline")
_ARTICLES: Final = ("the", "a", "an", "of", "no", "one", "every", "each", "in", "by", "for", "as", "to")
_QUESTIONS: Final = (
    "what",
    "how",
    "whether",
    "which",
    "who",
    "where",
    "when",
    "why",
    "is",
    "are",
    "does",
    "may",
    "can",
    "was",
)
NOT_IMPERATIVE: Final = frozenset(_ARTICLES + _QUESTIONS)
"""First words of noun phrases, fragments and questions."""
_PRAGMAS: Final = ("# type:", "# noqa", "# pragma", "#!")


def python_files(*folders: str) -> list[Path]:
    """Return the Python files below folders of the repository, sorted."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def function_docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line number and docstring of each function and method that has one; properties name what they return."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        is_property = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
        docstring = ast.get_docstring(node)
        if docstring and not is_property:
            yield node.lineno, docstring


def is_imperative(docstring: str) -> bool:
    """Return whether the first word may begin an imperative sentence; shapes in front of it are passed over."""
    first = docstring.split(maxsplit=1)[0]
    return first.lower().strip("`,.:;") not in NOT_IMPERATIVE and not first.startswith("(")


def other_docstrings(paths: Iterable[Path]) -> tuple[list[str], int]:
    """Return the places of docstrings that are no imperative sentence, and the number of all."""
    places, total = [], 0
    for path in paths:
        for line, docstring in function_docstrings(path):
            total += 1
            if not is_imperative(docstring):
                places.append(f"{path.relative_to(ROOT)}:{line}: {docstring.splitlines()[0]}")
    return places, total


def count_comments(path: Path) -> tuple[int, int]:
    """Count the comments of a file and its lines of code: without blank lines, comments alone and docstrings."""
    source = path.read_text()
    comments = 0
    code: set[int] = set()
    previous = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments += not token.string.startswith(_PRAGMAS)
            continue
        if token.type in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER):
            previous = token.type if token.type != tokenize.NL else previous
            continue
        is_text = token.type == tokenize.STRING and previous != tokenize.OP
        if not (is_text and previous in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)):
            code.update(range(token.start[0], token.end[0] + 1))
        previous = token.type
    return comments, len(code)


def comments_per_100_lines(*folders: str) -> float:
    """Return the number of comments for every 100 lines of code."""
    counts = [count_comments(path) for path in python_files(*folders)]
    return 100 * sum(comments for comments, _ in counts) / sum(lines for _, lines in counts)


def main() -> None:
    """Print the measurements, package by package."""
    for package in PACKAGES:
        for folder in sorted({path.parent for path in python_files(package)}):
            paths = sorted(folder.glob("*.py"))
            places, total = other_docstrings(paths)
            name = str(folder.relative_to(ROOT))
            counts = [count_comments(path) for path in paths]
            comments, lines = (sum(column) for column in zip(*counts, strict=True))
            print(f"{name:36} {len(places):4} of {total:4} docstrings, {100 * comments / max(lines, 1):5.1f} comments")
    places, total = other_docstrings(python_files(*PACKAGES))
    print(f"docstrings that are no imperative sentence: {len(places)} of {total}, {len(places) / total:.1%}")
    for name in ("stages/align", "train", "stages", "pipeline"):
        print(f"comments per 100 lines of code in {name}: {comments_per_100_lines(name):.1f}")


if __name__ == "__main__":
    main()
