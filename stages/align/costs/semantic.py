"""Semantic cost: distance between two candidates in the target model's input embeddings."""

import zlib
from collections.abc import Sequence
from typing import Final, Self

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cpdist

from stages.align.costs.pair_cache import NO_PAIR, PairCache
from stages.align.first_cuts import Encode
from stages.align.vocabulary_maps import NO_ID, ModelPair, text_ids
from stages.models.token_space import BLOCK_VALUES, TokenSpace
from stages.models.tokenizer import Encoding
from stages.models.vocabulary import Vocabulary

CACHE_SLOTS: Final = 2**22
"""Slots of ``SemanticCosts``: 16 bytes each, 67 MB per worker."""
SCALE_PAIRS: Final = 20_000
"""Random pairs of target tokens from which the scale is taken."""
CONTEXTS: Final = ("", "\n", "a", ".")
"""Texts before a candidate, to see how the target's tokenizer cuts it: some put a space before a text's first word."""

_SEED: Final = zlib.crc32(b"ptafuse: scale of the semantic cost")


class Pieces:
    """Target tokens that spell each source token: ragged rows of ids.

    Attributes:
        ids: all rows end to end, int32.
        starts: (V of the source + 1,) int64.
    """

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=self.starts[1:])
        self.ids = np.array([token_id for row in rows for token_id in row], np.int32)

    def row(self, source_id: int) -> np.ndarray:
        """Return the target tokens of one source token."""
        return self.ids[self.starts[source_id] : self.starts[source_id + 1]]


def spell(source: Vocabulary, target: Vocabulary, *, exact: np.ndarray, encode: Encode) -> Pieces:
    """Re-tokenise every source token with the target's tokenizer.

    A token that the target has is itself, special tokens by role or name. Any other is cut as the target's tokenizer
    cuts it after one of ``CONTEXTS``: the first after which the pieces spell exactly its bytes, else (a tokenizer that
    normalises) the first after which they begin where it begins. Bytes that are no text (part of a character), and a
    token that the tokenizer always merges with its context, are cut into the longest tokens of the vocabulary, left to
    right, bytes that no token begins with being skipped.

    Args:
        source: V tokens.
        target: the other vocabulary.
        exact: (V,) from ``vocabulary_maps.exact_map``.
        encode: the target's tokenizer: ids and byte ends of each text, with or without BOS.

    Returns:
        V rows; empty where nothing of the token is in the target's vocabulary.
    """
    rows: list[list[int]] = [[] if token_id == NO_ID else [int(token_id)] for token_id in exact]
    unknown = [
        token_id
        for token_id, token in enumerate(source.token_bytes)
        if exact[token_id] == NO_ID and token and not source.is_special[token_id]
    ]
    # 1. Let the target's tokenizer cut every token that is text.
    texts = {token_id: _decoded(source.token_bytes[token_id]) for token_id in unknown}
    open_ids = [token_id for token_id in unknown if texts[token_id] is not None]
    settled: set[int] = set()
    for context in CONTEXTS:
        encodings = encode([context + (texts[token_id] or "") for token_id in open_ids])
        for token_id, encoding in zip(open_ids, encodings, strict=True):
            spelling = _after(encoding, len(context.encode()), target)
            if not rows[token_id]:
                rows[token_id] = spelling
            if b"".join(target.token_bytes[piece] for piece in spelling) == source.token_bytes[token_id]:
                rows[token_id] = spelling
                settled.add(token_id)
        open_ids = [token_id for token_id in open_ids if token_id not in settled]
    # 2. Cut the others, byte by byte, into the longest tokens of the vocabulary.
    known = text_ids(target, {})
    longest = max(map(len, known), default=0)
    for token_id in unknown:
        if not rows[token_id]:
            rows[token_id] = _longest_pieces(source.token_bytes[token_id], known, longest)
    return Pieces(rows)


class SemanticCosts:
    """Cosine distances of input embeddings, scaled to edits.

    Tokens are directions from their common centre (``TokenSpace``), a source candidate is the mean of its pieces.
    ``cost = scale (1 - cos)``, with the scale at which two random tokens of the target are as far apart as by edit
    distance, on average, so that an epsilon in edits means about the same; 0 for the same token, and ``scale``
    (unrelated) where a candidate has no embedding.

    Costs are remembered in a table of fixed size.

    Args:
        embeddings: (V of the target or more, H) the model's input embeddings; kept as float16.
        pieces: pieces from ``spell``.
        target: the target's vocabulary.
        target_texts: text of each target id.
        num_slots: a power of two.

    Raises:
        ValueError: the matrix has too few rows, or the number of slots is not a power of two.
    """

    def __init__(
        self,
        embeddings: np.ndarray,
        pieces: Pieces,
        target: Vocabulary,
        target_texts: Sequence[str],
        *,
        num_slots: int = CACHE_SLOTS,
    ) -> None:
        self._size = target.size
        self._space = TokenSpace(embeddings, target)
        self._pieces = pieces
        self._cache = PairCache(num_slots)
        self.scale = self._edits_per_unit(np.flatnonzero(~target.is_special), target_texts)

    @classmethod
    def of(cls, pair: ModelPair, *, num_slots: int | None = None) -> Self:
        """Return the costs of a pair of models; loads the target's input embeddings."""
        pieces = spell(pair.source, pair.target, exact=pair.exact, encode=pair.encode)
        return cls(pair.load_embeddings(), pieces, pair.target, pair.target_texts, num_slots=num_slots or CACHE_SLOTS)

    def costs(self, source_ids: np.ndarray, target_ids: np.ndarray) -> np.ndarray:
        """Return the cost matrices of a batch of transport problems; see ``base.Costs``."""
        keys = source_ids[:, :, None].astype(np.int64) * self._size + target_ids[:, None, :]
        keys[(source_ids == NO_ID)[:, :, None] | (target_ids == NO_ID)[:, None, :]] = NO_PAIR
        costs = self._cache.lookup(keys.reshape(-1), lambda new: self._pair_costs(*np.divmod(new, self._size)))
        return costs.reshape(keys.shape)

    def _pair_costs(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Compute the costs of pairs, (Q,) each; the vector of every distinct token is built once."""
        costs = np.empty(len(source), np.float32)
        # In blocks, since both sides' vectors are (block, H) float32.
        step = max(1, BLOCK_VALUES // self._space.num_dimensions)
        for start in range(0, len(source), step):
            block = slice(start, start + step)
            ids, row = np.unique(source[block], return_inverse=True)
            vectors = np.stack([self._vector(self._pieces.row(token_id)) for token_id in ids.tolist()])
            other_ids, other_row = np.unique(target[block], return_inverse=True)
            others = self._space.directions(other_ids)
            cosine = np.einsum("qh,qh->q", vectors[row], others[other_row])
            costs[block] = self.scale * np.clip(1.0 - cosine, 0.0, 2.0)
        starts = self._pieces.starts
        single = np.flatnonzero(starts[source + 1] - starts[source] == 1)
        is_same = self._pieces.ids[starts[source[single]]] == target[single]
        costs[single[is_same]] = 0.0  # the same token costs exactly 0, without rounding errors
        return costs

    def _vector(self, pieces: np.ndarray) -> np.ndarray:
        """Return the unit vector of a candidate, (H,); zeros without pieces, which is unrelated to everything."""
        if not len(pieces):
            return np.zeros(self._space.num_dimensions, np.float32)
        return self._space.directions_of(self._space.rows[pieces].astype(np.float32).mean(axis=0, keepdims=True))[0]

    def _edits_per_unit(self, ordinary: np.ndarray, texts: Sequence[str]) -> float:
        """Divide the mean edit distance of random pairs of different tokens by their mean cosine distance.

        Returns 1 if there are no such pairs.
        """
        if len(ordinary) < 2:
            return 1.0
        rng = np.random.default_rng(_SEED)
        first = rng.integers(len(ordinary), size=SCALE_PAIRS)
        second = (first + rng.integers(1, len(ordinary), size=SCALE_PAIRS)) % len(ordinary)
        first, second = ordinary[first], ordinary[second]
        edits = cpdist(
            [texts[i] for i in first], [texts[i] for i in second], scorer=Levenshtein.distance, dtype=np.int32
        )
        total = 0.0
        step = max(1, BLOCK_VALUES // self._space.num_dimensions)
        for start in range(0, SCALE_PAIRS, step):
            block = slice(start, start + step)
            directions = self._space.directions(first[block]), self._space.directions(second[block])
            cosine = np.einsum("qh,qh->q", *directions)
            total += float((1.0 - cosine).sum(dtype=np.float64))
        return float(edits.sum()) / total if total > 0 else 1.0


def _decoded(token: bytes) -> str | None:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None


def _after(encoding: Encoding, num_context_bytes: int, target: Vocabulary) -> list[int]:
    """Return the tokens after the context; none if a token spans the end of the context."""
    starts = np.concatenate([[0], encoding.byte_end[:-1]])
    inside = encoding.byte_end > num_context_bytes
    if (starts[inside] < num_context_bytes).any():
        return []
    return [int(token_id) for token_id in encoding.ids[inside] if not target.is_special[token_id]]


def _longest_pieces(token: bytes, known: dict[bytes, int], longest: int) -> list[int]:
    pieces = []
    start = 0
    while start < len(token):
        for length in range(min(longest, len(token) - start), 0, -1):
            piece = known.get(token[start : start + length])
            if piece is not None:
                pieces.append(piece)
                start += length
                break
        else:
            start += 1
    return pieces
