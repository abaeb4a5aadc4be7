"""Choice of the shards and documents that are read: a draw that depends only on the seed and on their numbers."""

import hashlib
from collections.abc import Sequence

import numpy as np


def choose_shards(num_shards: int, *, max_shards: int, seed: int) -> list[int]:
    """Choose at most ``max_shards`` of a run's shards, ascending.

    A larger ``max_shards`` adds shards to those of a smaller one.
    """
    return sorted(sorted(range(num_shards), key=lambda shard: _draw(seed, "shard", shard))[:max_shards])


def choose_rows(doc_ids: np.ndarray, num_positions: np.ndarray, *, max_positions: int, seed: int) -> list[int]:
    """Choose the rows of whole documents of a shard, ascending: documents are drawn until they have enough positions.

    Args:
        doc_ids: (R,) the document of each row.
        num_positions: (R,) positions of each row.
        max_positions: enough; the last document may exceed it.
        seed: seed of the draw.
    """
    size: dict[int, int] = {}
    for doc_id, count in zip(doc_ids.tolist(), num_positions.tolist(), strict=True):
        size[doc_id] = size.get(doc_id, 0) + count
    chosen: set[int] = set()
    total = 0
    for doc_id in sorted(size, key=lambda doc_id: _draw(seed, "document", doc_id)):
        if total >= max_positions:
            break
        chosen.add(doc_id)
        total += size[doc_id]
    return [row for row, doc_id in enumerate(doc_ids.tolist()) if doc_id in chosen]


def length_kind(num_bytes: int) -> str:
    """Return the kind of a document of which only the length is known."""
    return next((name for most, name in LENGTH_KINDS if num_bytes < most), LONGEST)


LENGTH_KINDS: Sequence[tuple[int, str]] = (
    (1000, "under 1 kB"),
    (4000, "1 to 4 kB"),
    (16_000, "4 to 16 kB"),
    (64_000, "16 to 64 kB"),
)
LONGEST = "over 64 kB"


def _draw(seed: int, kind: str, number: int) -> bytes:
    """Return a number that looks random and is the same in every version of every library."""
    return hashlib.sha256(f"{seed}:{kind}:{number}".encode()).digest()
