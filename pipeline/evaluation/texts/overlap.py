"""Overlap of a document with another text: exact equality, and the share of its 13-grams of words."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import numpy as np
import regex

NGRAM: Final = 13
"""Words of an n-gram, as in the contamination studies of GPT-3 (arXiv 2005.14165, appendix C)."""

_UNSPACED: Final = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Scripts that write no spaces between words (Thai, Lao, Burmese, Khmer, Kana, Han): each character counts as a word."""
# With the marks that follow a letter: the vowel signs of Hindi, say.
_WORD: Final = regex.compile(
    rf"[{_UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{N}}_]--[{_UNSPACED}]][[\p{{L}}\p{{M}}\p{{N}}_]--[{_UNSPACED}]]*",
    regex.VERSION1,
)
_INVISIBLE: Final = regex.compile("[\u00ad\u200b-\u200d\u20e3\u2060\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]+")
"""Soft hyphens, joiners, variation selectors: how a word is shown, not which one it is."""
_MULTIPLIER: Final = np.uint64(0x9E3779B97F4A7C15)
_MAX_WORDS_KNOWN: Final = 2_000_000
"""Number of distinct words whose hashes are cached, about 250 MB; then the table is cleared."""


@dataclass(frozen=True)
class Overlap:
    """Overlap of a document with another text.

    Attributes:
        is_equal: one of its documents is the same, up to white space.
        share: share of the document's n-grams that occur in it; 0 for a document of fewer words than an n-gram has.
    """

    is_equal: bool
    share: float


class OverlapIndex:
    """Index of the n-grams of some documents, against which a text of any length is read once.

    It takes 9 bytes per n-gram of the documents plus the data of one call of ``read``, however much is read.
    """

    def __init__(self, texts: Sequence[str], wholes: Sequence[str] | None = None) -> None:
        """Index documents.

        Args:
            texts: scored part of each document, whose n-grams are searched for.
            wholes: the documents as written in their corpus, compared for equality as well; by default ``texts``.
        """
        self._words = _WordHashes()
        grams = [_grams(self._words(words(text))) for text in texts]
        self._known = np.unique(np.concatenate([np.empty(0, np.uint64), *grams]))
        self._places = [np.searchsorted(self._known, ngrams) for ngrams in grams]
        self._is_found = np.zeros(len(self._known), bool)
        self._keys = [{_key(text), _key(whole)} for text, whole in zip(texts, wholes or texts, strict=True)]
        self._wanted = set().union(*self._keys)
        self._equal: set[bytes] = set()

    def read(self, texts: Sequence[str]) -> None:
        """Look for the indexed documents in more documents of the other text. N-grams never reach over two documents."""
        self._equal |= self._wanted.intersection(map(_key, texts))
        hashes = [self._words(words(text)) for text in texts]
        # The n-grams of all documents at once: numpy calls on single documents would take longer than the work in them.
        lengths = np.array([len(hashed) for hashed in hashes], np.int64)
        grams = _grams(np.concatenate([np.empty(0, np.uint64), *hashes]))
        if not len(grams) or not len(self._known):
            return
        ends = np.repeat(np.cumsum(lengths), lengths)[: len(grams)]
        grams = grams[np.arange(len(grams)) + NGRAM <= ends]
        places = np.searchsorted(self._known, grams)
        places = np.minimum(places, len(self._known) - 1)
        self._is_found[places[self._known[places] == grams]] = True

    def overlaps(self) -> list[Overlap]:
        """Return the overlap of each indexed document that was found so far."""
        return [
            Overlap(bool(keys & self._equal), float(self._is_found[places].mean()) if len(places) else 0.0)
            for keys, places in zip(self._keys, self._places, strict=True)
        ]


def words(text: str) -> list[str]:
    """Return the words of a text, case and punctuation left out, and however its characters are composed."""
    return _WORD.findall(_INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).lower())


class _WordHashes:
    """Cache of 64-bit hashes of words."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def __call__(self, word_list: Sequence[str]) -> np.ndarray:
        """Hash words, (N,) uint64."""
        known = self._known
        if len(known) > _MAX_WORDS_KNOWN:
            known.clear()
        for word in set(word_list).difference(known):
            known[word] = int.from_bytes(blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest(), "big")
        return np.fromiter((known[word] for word in word_list), np.uint64, len(word_list))


def _grams(hashes: np.ndarray) -> np.ndarray:
    """Hash every run of ``NGRAM`` words: (N,) to (N - NGRAM + 1,), or (0,) for fewer words.

    A polynomial in the words' hashes modulo 2^64: two runs of other words meet with a probability of about 2^-64.
    """
    num_grams = len(hashes) - NGRAM + 1
    if num_grams <= 0:
        return np.empty(0, np.uint64)
    grams = np.zeros(num_grams, np.uint64)
    for offset in range(NGRAM):
        grams = grams * _MULTIPLIER + hashes[offset : offset + num_grams]
    return grams


def _key(text: str) -> bytes:
    """Identify a text up to white space, and to how its characters are composed."""
    return blake2b(
        " ".join(unicodedata.normalize("NFC", text).split()).encode(errors="surrogatepass"), digest_size=16
    ).digest()
