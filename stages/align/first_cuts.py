"""Position of a tokenizer's first cut in a text."""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from stages.models.tokenizer import Encoding
from stages.models.vocabulary import Vocabulary

Encode = Callable[[list[str]], Sequence[Encoding]]
"""A tokenizer: ids and byte ends of each text, with or without BOS."""

CONTEXTS: Final = ("", "\n", "a", ".", "ж")
"""Texts before a token's text, in the order in which they are tried. A tokenizer with a dummy prefix writes the first word of
a text with a space, and one that merges across words or only marks the inside of words needs something that ends before
the text: a line break, a letter, punctuation, a letter that few vocabularies merge with Latin ones."""

UNKNOWN: Final = 0
"""Length of a first token that is not known: no token has it, so nothing counts as the beginning."""


def after_line_break(encode: Encode, *, has_space: bool) -> Encode:
    """Return a tokenizer of texts that begin after a line break, with a space between or without, as messages may.

    Args:
        encode: the tokenizer.
        has_space: a space that is not the text's own stands before it.

    Returns:
        Tokens of each text without its context; none where a token reaches over its start.
    """
    context = "\n"
    written = context + " " * has_space

    def encode_behind(texts: list[str]) -> list[Encoding]:
        return [_behind(encoding, len(context)) for encoding in encode([written + text for text in texts])]

    return encode_behind


def _behind(encoding: Encoding, start: int) -> Encoding:
    """Return the tokens that begin at byte ``start`` and after it; none where no token ends there."""
    first = int(np.searchsorted(encoding.byte_end, start, side="right"))
    if not first or encoding.byte_end[first - 1] != start:
        first = len(encoding.ids)
    return Encoding(encoding.ids[first:], encoding.byte_end[first:] - start)


class FirstCuts:
    """Finder of the first token that a tokenizer cuts off a text, which is the text of another tokenizer's token.

    In the middle of a text, the first of ``CONTEXTS`` counts after which a token begins where the text begins and spells
    the text's beginning. Texts of which a tokenizer makes something else (lower case, NFKC), or which it always merges with
    what stands before, have no known cut. Bytes that are not UTF-8 on their own (a part of a character) cannot be given to
    a tokenizer: there the longest token of its vocabulary that begins them counts, as byte-pair merges mostly end.

    Args:
        vocabulary: the tokenizer's tokens, as its texts are written (``ModelPair.at_text_start``).
        encode: the tokenizer.
        start_mark: prefix of the written texts at the start of a text; None in the middle.
    """

    def __init__(self, vocabulary: Vocabulary, encode: Encode, *, start_mark: bytes | None = None) -> None:
        self._vocabulary = vocabulary
        self._encode = encode
        self._start_mark = start_mark
        self._ordinary = frozenset(
            token
            for token, is_special in zip(vocabulary.token_bytes, vocabulary.is_special.tolist(), strict=True)
            if token and not is_special
        )
        self._longest = max(map(len, self._ordinary), default=0)

    def of_vocabulary(self, other: Vocabulary) -> np.ndarray:
        """Return ``lengths`` of all ordinary tokens of another vocabulary, (V of the other,) int32.

        Special tokens get ``UNKNOWN``.
        """
        ordinary = np.flatnonzero(~other.is_special)
        lengths = np.full(other.size, UNKNOWN, np.int32)
        lengths[ordinary] = self.lengths([other.token_bytes[token_id] for token_id in ordinary.tolist()])
        return lengths

    def lengths(self, texts: Sequence[bytes]) -> np.ndarray:
        """Return how long the first token of each text is.

        Args:
            texts: T texts as bytes, not necessarily UTF-8.

        Returns:
            (T,) int32, bytes; ``UNKNOWN`` (0) where the tokenizer writes nothing that begins the text.
        """
        lengths = np.full(len(texts), UNKNOWN, np.int32)
        decoded: dict[int, str] = {}
        for index, text in enumerate(texts):
            try:
                decoded[index] = text.decode()
            except UnicodeDecodeError:  # a part of a character cannot be given to a tokenizer
                lengths[index] = self._longest_prefix(text)
        if self._start_mark is not None:
            self._cut_at_start(texts, decoded, lengths)
            return lengths
        # The texts that an earlier context did not settle are tried after the next one.
        for context in CONTEXTS:
            num_context_bytes = len(context.encode())
            encodings = self._encode([context + text for text in decoded.values()])
            for index, encoding in zip(tuple(decoded), encodings, strict=True):
                lengths[index] = self._after(encoding, num_context_bytes, texts[index])
                if lengths[index] != UNKNOWN:
                    del decoded[index]
        return lengths

    def _cut_at_start(self, texts: Sequence[bytes], decoded: dict[int, str], lengths: np.ndarray) -> None:
        """Tokenize what stands at the start of a text as it is; its first token is compared as it is written."""
        assert self._start_mark is not None
        mark = self._start_mark.decode()
        marked = [index for index, text in decoded.items() if text.startswith(mark) and text != mark]
        vocabulary = self._vocabulary
        for index, encoding in zip(marked, self._encode([decoded[i][len(mark) :] for i in marked]), strict=True):
            first = next(
                (vocabulary.token_bytes[i] for i in encoding.ids.tolist() if not vocabulary.is_special[i]), b""
            )
            if texts[index].startswith(first):
                lengths[index] = len(first)

    def _after(self, encoding: Encoding, num_context_bytes: int, text: bytes) -> int:
        """Return the length of the token that begins where the context ends, if it spells the text's beginning."""
        start = 0
        for token_id, end in zip(encoding.ids.tolist(), encoding.byte_end.tolist(), strict=True):
            if end > num_context_bytes:
                length = end - num_context_bytes
                spells = start == num_context_bytes and self._vocabulary.token_bytes[token_id] == text[:length]
                return length if spells else UNKNOWN
            start = end
        return UNKNOWN

    def _longest_prefix(self, text: bytes) -> int:
        for length in range(min(len(text), self._longest), 0, -1):
            if text[:length] in self._ordinary:
                return length
        return UNKNOWN
