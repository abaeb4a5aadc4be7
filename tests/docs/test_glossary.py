"""The glossary has each word once, in order."""

import re
from pathlib import Path

GLOSSARY = Path(__file__).parents[2] / "docs" / "glossary.md"


def test_each_word_is_explained_once_and_in_order() -> None:
    text = GLOSSARY.read_text(encoding="utf-8")
    words = re.findall(r"^### (.+)$", text, flags=re.MULTILINE)
    assert len(words) > 40
    assert words == sorted(set(words), key=str.lower)
    explanations = re.split(r"^### .+$", text, flags=re.MULTILINE)[1:]
    assert all(len(explanation.split()) > 4 for explanation in explanations)
