"""Links and quoted paths of the documents lead somewhere: also in a file viewer, without the site."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from docs.hooks.reference import PAGES

REPOSITORY: Final = Path(__file__).parents[2]
DOCUMENTS: Final = sorted(
    [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / "infra").rglob("*.md")]
)
GENERATED: Final = {REPOSITORY / "docs" / page for page in PAGES}
FOLDERS: Final = ("pipeline", "stages", "train", "tests", "infra", "docs")


def _prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def _links(text: str) -> Iterator[str]:
    """Yield the targets of inline links, of images, and of reference definitions."""
    yield from re.findall(r"\]\(([^)\s]+)\)", _prose(text))
    yield from re.findall(r"^\[[^\]]+\]: (\S+)$", _prose(text), flags=re.MULTILINE)


def _anchors(text: str) -> set[str]:
    """Return the anchors that GitHub and mkdocs give the headings of a page."""
    found = set()
    for heading in re.findall(r"^#{1,6} (.*)$", _prose(text), flags=re.MULTILINE):
        plain = re.sub(r"&\w+;", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)).strip().lower()
        found.add(re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", plain)))
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_link_of_a_document_leads_to_a_file_and_a_heading(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for link in _links(text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists() or target in GENERATED, f"{document.name} links to {link}, which is not there"
        if anchor and target.suffix == ".md" and target not in GENERATED:
            assert anchor in _anchors(target.read_text(encoding="utf-8")), f"{document.name}: {link} names no heading"


NOW = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]  # which speaks of what there was, too


@pytest.mark.parametrize("document", NOW, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_path_of_the_code_that_a_document_quotes_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for quoted in re.findall(r"`([\w./-]+)`", text):
        if quoted.split("/")[0] in FOLDERS and "/" in quoted:
            path = REPOSITORY / quoted
            assert path.exists() or path in GENERATED, f"{document.name} speaks of {quoted}, which is not there"


def test_documents_are_found() -> None:
    assert len(DOCUMENTS) > 20


def test_a_link_that_leads_nowhere_is_seen() -> None:
    text = "# A heading: of `code`\n\n[a](b.md#c) ![d](e.png)\n\n```\n[no](link)\n```\n\n[f]: g.md\n"
    assert list(_links(text)) == ["b.md#c", "e.png", "g.md"]
    assert _anchors(text) == {"a-heading-of-code"}
