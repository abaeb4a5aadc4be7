"""Choice of the documents of a corpus that are scored, which depends only on the corpus and the settings."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b

NO_KIND = "(none)"
"""The kind of a document whose record names none, as ``ptafuse interpret`` calls it."""


def choose_documents(
    kinds: Sequence[str], *, num_documents: int | None = None, fraction: float | None = None
) -> list[int]:
    """Choose documents, spread over their kinds; within a kind by a hash of their numbers.

    Args:
        kinds: kind of every document of the corpus, in order.
        num_documents: number of documents in total; each kind gets an equal share, and the others get what a small kind lacks.
        fraction: instead of ``num_documents``, the share of each kind, rounded, at least one document.

    Returns:
        The documents' numbers, ascending; all where neither is given.
    """
    if num_documents is None and fraction is None:
        return list(range(len(kinds)))
    members: dict[str, list[int]] = {}
    for number, kind in enumerate(kinds):
        members.setdefault(kind, []).append(number)
    sizes = {kind: len(numbers) for kind, numbers in members.items()}
    if num_documents is not None:
        shares = _equal_shares(sizes, num_documents)
    else:
        assert fraction is not None
        shares = {kind: max(1, round(fraction * size)) for kind, size in sizes.items()}
    chosen = [number for kind, numbers in members.items() for number in sorted(numbers, key=_draw)[: shares[kind]]]
    return sorted(chosen)


def shorten(text: str, max_characters: int | None) -> str:
    """Cut a text at the last white space that leaves at most ``max_characters``.

    A text without white space in the second half of these is cut between two characters.
    """
    if max_characters is None or len(text) <= max_characters:
        return text
    for end in range(max_characters, max_characters // 2, -1):
        if text[end].isspace():
            return text[:end]
    return text[:max_characters]


def _equal_shares(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Share a number of documents among kinds: the smallest first, each an equal part of what is left."""
    shares = {}
    left = total
    # If kinds have the same size, the last ones by name get the remainder.
    for index, (kind, size) in enumerate(sorted(sizes.items(), key=lambda item: (item[1], item[0]))):
        shares[kind] = min(size, left // (len(sizes) - index))
        left -= shares[kind]
    return shares


def _draw(number: int) -> bytes:
    return blake2b(str(number).encode(), digest_size=8).digest()
