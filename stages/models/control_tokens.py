"""Find the text of control tokens in documents: conversations that were rendered with some model's template."""

import re
from collections.abc import Iterable
from typing import Final

_MARKUP: Final = re.compile(r"</?[a-z]{1,4}>")
"""``<s>``, ``</s>``, ``<pad>``, ``<unk>``: markup of web pages looks the same, so their text says nothing."""
_SHAPE: Final = re.compile(r"<\|[^\s<>|]{1,60}\|>|<[A-Za-z/_][\w/:-]{0,60}>|\[/?[A-Z_]{2,30}\]")
"""Form of nearly all control tokens; a text is searched for the shape, and what is found is looked up."""


class ControlTokens:
    """Control tokens of several tokenizers, as text.

    Args:
        contents: texts of the tokens that the tokenizers declare special.
    """

    def __init__(self, contents: Iterable[str]) -> None:
        self._known = frozenset(content for content in contents if content and not _MARKUP.fullmatch(content))
        others = sorted((content for content in self._known if not _SHAPE.fullmatch(content)), key=len, reverse=True)
        self._others = re.compile("|".join(map(re.escape, others))) if others else None

    def find(self, text: str) -> set[str]:
        """Return the control tokens whose text a document holds."""
        tokens = {match for match in _SHAPE.findall(text) if match in self._known} if self._known else set()
        if self._others is not None:
            tokens.update(self._others.findall(text))
        return tokens
