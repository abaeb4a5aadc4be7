"""Measure the language of the code: ``python -m tests.language`` prints the figures, ``test_language.py`` checks them."""

import ast
import io
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PACKAGES: Final = ("stages", "train", "pipeline")
MOST_NOT_IMPERATIVE: Final = 0.07
"""Largest share of function docstrings that may begin with a noun phrase, a fragment or a question."""
LEAST_COMMENTS: Final = 3.0
"""Smallest number of comments per 100 lines of code in ``COMMENTED``."""
COMMENTED: Final = ("stages/align", "train")
"""Packages of numerical kernels and of the training loop, whose lines do not show shapes, invariants and reasons."""

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
_NOT_IMPERATIVE: Final = frozenset(_ARTICLES + _QUESTIONS)
_PRAGMAS: Final = ("# type:", "# noqa", "# pragma", "#!")
_LAYOUT: Final = frozenset({tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER})


def python_files(*folders: str) -> list[Path]:
    """Return the Python files below folders of the repository, sorted."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def function_docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line number and docstring of each function and method that has one, except properties."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        is_property = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
        docstring = ast.get_docstring(node)
        if docstring and not is_property:
            yield node.lineno, docstring


def is_imperative(docstring: str) -> bool:
    """Return whether the first word may be a verb in the imperative; a shape such as "(N,)" is not."""
    first = docstring.split(maxsplit=1)[0]
    return first.lower().strip("`,.:;") not in _NOT_IMPERATIVE and not first.startswith("(")


def not_imperative(paths: Iterable[Path]) -> tuple[list[str], int]:
    """Return the function docstrings that are not imperative sentences, with their places, and the number of all."""
    places, total = [], 0
    for path in paths:
        for line, docstring in function_docstrings(path):
            total += 1
            if not is_imperative(docstring):
                places.append(f"{path.relative_to(ROOT)}:{line}: {docstring.splitlines()[0]}")
    return places, total


def count_comments(source: str) -> tuple[int, int]:
    """Count comments, without those for tools, and lines of code, without blank lines, comment lines and docstrings."""
    comments = 0
    code: set[int] = set()
    begins_statement = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments += not token.string.startswith(_PRAGMAS)
        elif token.type in _LAYOUT:
            begins_statement = begins_statement or token.type == tokenize.NEWLINE
        else:
            if token.type != tokenize.STRING or not begins_statement:
                code.update(range(token.start[0], token.end[0] + 1))
            begins_statement = False
    return comments, len(code)


def comments_per_100_lines(*folders: str) -> float:
    """Return the number of comments per 100 lines of code."""
    counts = [count_comments(path.read_text()) for path in python_files(*folders)]
    return 100 * sum(comments for comments, _ in counts) / sum(lines for _, lines in counts)


def main() -> None:
    """Print the measurements, folder by folder."""
    for folder in sorted({path.parent for path in python_files(*PACKAGES)}):
        paths = sorted(folder.glob("*.py"))
        places, total = not_imperative(paths)
        counts = [count_comments(path.read_text()) for path in paths]
        comments, lines = (sum(column) for column in zip(*counts, strict=True))
        rate = 100 * comments / max(lines, 1)
        print(f"{folder.relative_to(ROOT)!s:36} {len(places):4} of {total:4} docstrings, {rate:5.1f} comments")
    places, total = not_imperative(python_files(*PACKAGES))
    print(f"function docstrings that are not imperative: {len(places)} of {total}, {len(places) / total:.1%}")
    for name in (*COMMENTED, *PACKAGES):
        print(f"comments per 100 lines of code in {name}: {comments_per_100_lines(name):.1f}")


if __name__ == "__main__":
    main()
