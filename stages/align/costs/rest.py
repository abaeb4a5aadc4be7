"""Costs between the rests of source tokens and target tokens.

The rest of a token (``national`` of `` international`` after `` inter``) is a text that need not be a token of any vocabulary,
so rests get numbers of their own.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cpdist

from stages.align.costs.pair_cache import NO_PAIR, PairCache
from stages.align.costs.prefix import EDITS_PER_BYTE
from stages.align.first_cuts import FirstCuts
from stages.align.vocabulary_maps import NO_ID, ModelPair, text_ids

CACHE_SLOTS: Final = 2**18
"""Slots of ``RestCosts``: 16 bytes each, 4 MB per worker."""
MAX_RESTS: Final = 2**16
"""Rests that are remembered; bounds memory."""


class RestCosts:
    """Prefix cost between the rests of source tokens and target tokens, in the middle of a text.

    A rest is known by its source token's bytes and how many of them were seen. A shorter target token counts as the
    beginning of a rest if the target's tokenizer begins the rest with it; a longer one continues the rest if the source's
    tokenizer begins the whole text, what was seen and then the target token, with the source token. Everything else costs
    the edit distance.

    What is computed for a rest and for a pair is remembered, in bounded memory, and does not depend on what was asked before.

    Args:
        pair: the two models, as they are in the middle of a text.
        num_slots: pairs that are remembered, a power of two.
        max_rests: rests that are remembered before the table begins again.
    """

    def __init__(self, pair: ModelPair, *, num_slots: int = CACHE_SLOTS, max_rests: int = MAX_RESTS) -> None:
        self._target = pair.target
        self._target_texts = pair.target_texts
        self._by_target = FirstCuts(pair.target, pair.encode)
        self._by_source = FirstCuts(pair.source, pair.encode_source)
        self._token_of = text_ids(pair.target, pair.preferred)
        self._longest = max(map(len, self._token_of), default=0)
        self._num_slots = num_slots
        self._max_rests = max_rests
        self._start()

    def numbers(self, seen: Sequence[bytes], tokens: Sequence[bytes]) -> np.ndarray:
        """Return a number for each rest; those of one call stay valid until the next.

        Args:
            seen: R times the bytes seen.
            tokens: R source tokens' bytes, each longer than what was seen and beginning with it.

        Returns:
            (R,) int32; equal for equal rests.
        """
        if len(self._keys) > self._max_rests:
            self._start()
        keys = [(token, len(prefix)) for token, prefix in zip(tokens, seen, strict=True)]
        new = [key for key in dict.fromkeys(keys) if key not in self._numbers]
        if new:
            rests = [token[num_seen:] for token, num_seen in new]
            self._numbers |= {key: len(self._keys) + index for index, key in enumerate(new)}
            self._keys += new
            self._cuts += self._by_target.lengths(rests).tolist()
            self._exact += [self._token_of.get(rest, NO_ID) for rest in rests]
            self._first += [self._first_token(rest) for rest in rests]
        return np.array([self._numbers[key] for key in keys], np.int32)

    def first_token(self, numbers: np.ndarray) -> np.ndarray:
        """Return the target token that begins each rest, (R,) int32: the rest itself, else its longest prefix.

        The entry is -1 if no target token begins the rest.
        """
        return np.array([self._first[number] for number in numbers.tolist()], np.int32)

    def exact(self, numbers: np.ndarray) -> np.ndarray:
        """Return the target token with the same bytes as each rest, (R,) int32; -1 if there is none."""
        return np.array([self._exact[number] for number in numbers.tolist()], np.int32)

    def costs(self, rests: np.ndarray, target_ids: np.ndarray) -> np.ndarray:
        """Return the cost matrices of a batch of transport problems.

        Args:
            rests: (P, n) from ``numbers``; -1 at pads.
            target_ids: (P, m) candidates of the target; -1 at pads.

        Returns:
            (P, n, m) float64, in edits, to float32's precision; 0 at pads.
        """
        keys = rests[:, :, None].astype(np.int64) * self._target.size + target_ids[:, None, :]
        keys[(rests == NO_ID)[:, :, None] | (target_ids == NO_ID)[:, None, :]] = NO_PAIR
        return self._cache.lookup(keys.reshape(-1), self._pair_costs).reshape(keys.shape)

    def _start(self) -> None:
        """Forget all rests and the cached costs, whose keys contain the rests' numbers."""
        self._numbers: dict[tuple[bytes, int], int] = {}
        self._keys: list[tuple[bytes, int]] = []
        self._cuts: list[int] = []
        self._exact: list[int] = []
        self._first: list[int] = []
        self._cache = PairCache(self._num_slots)

    def _first_token(self, rest: bytes) -> int:
        for length in range(min(len(rest), self._longest), 0, -1):
            token_id = self._token_of.get(rest[:length])
            if token_id is not None:
                return token_id
        return NO_ID

    def _pair_costs(self, keys: np.ndarray) -> np.ndarray:
        """Compute the costs of new pairs, (Q,), each once."""
        numbers, target_ids = (array.tolist() for array in np.divmod(keys, self._target.size))
        rests = [self._keys[number][0][self._keys[number][1] :] for number in numbers]
        costs = cpdist(
            [rest.decode("utf-8", errors="surrogateescape") for rest in rests],
            [self._target_texts[token_id] for token_id in target_ids],
            scorer=Levenshtein.distance,
            dtype=np.float32,
        )
        # Lower the cost of target tokens that begin the rest, and collect those that continue it.
        continued: list[int] = []
        for index, (number, token_id, rest) in enumerate(zip(numbers, target_ids, rests, strict=True)):
            if self._target.is_special[token_id]:
                continue
            token = self._target.token_bytes[token_id]
            if len(token) == self._cuts[number] and rest.startswith(token):
                costs[index] = EDITS_PER_BYTE * (len(rest) - len(token))
            elif len(token) > len(rest) and token.startswith(rest):
                continued.append(index)
        # Ask the source's tokenizer, for these few pairs, whether it would cut the longer text after the same token.
        sources = [self._keys[numbers[index]] for index in continued]
        tokens = [self._target.token_bytes[target_ids[index]] for index in continued]
        cuts = self._by_source.lengths(
            [source[:num_seen] + token for (source, num_seen), token in zip(sources, tokens, strict=True)]
        )
        for index, (source, _), token, cut in zip(continued, sources, tokens, cuts.tolist(), strict=True):
            if cut == len(source):
                costs[index] = EDITS_PER_BYTE * (len(token) - len(rests[index]))
        return costs
