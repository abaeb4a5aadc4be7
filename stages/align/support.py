"""The target candidates to which a source's mass may move, and their prior."""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from numba import njit

from stages.models.tokenizer import Vocabulary

NO_ID = -1


def target_support(target_ids: np.ndarray, target_probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The target's own candidates (the paper's support).

    Args:
        target_ids: (P, k) the target's largest entries, descending; -1 at pads.
        target_probs: (P, k) their probabilities; 0 at pads.

    Returns:
        ids (P, k) and prior (P, k); a prior sums to 1, or to 0 where the target has no entry.
    """
    return target_ids, _normalised(target_probs)


def union_support(
    target_ids: np.ndarray, target_probs: np.ndarray, source_ids: np.ndarray, first_token: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The target's own candidates, and for every source candidate the target token that begins its text.

    An added token that is not among the target's candidates gets half the probability of the least of them.

    Args:
        target_ids: (P, k) the target's largest entries, descending; -1 at pads.
        target_probs: (P, k) their probabilities; 0 at pads.
        source_ids: (P, n) the source's candidates; -1 at pads.
        first_token: (V of the source,) from ``prefix_map``.

    Returns:
        ids (P, k + n), each id once, -1 at pads, and prior (P, k + n), which sums to 1 (to 0 where the target has no
        entry).
    """
    ids, prior = _union(target_ids, target_probs, source_ids, first_token)
    return ids, _normalised(prior)


def prefix_map(source: Vocabulary, target: Vocabulary, preferred: Mapping[bytes, int]) -> np.ndarray:
    """For each source token the target token that begins its text.

    That is the token itself where the target vocabulary has it, else its longest prefix there, compared in bytes with a
    word-boundary marker as one space. BOS and EOS go by role; any other special token only to a special token of the
    same name. Text never goes to a special token.

    Args:
        source: V tokens.
        target: the other vocabulary.
        preferred: bytes -> id, where several target tokens have the same bytes; see ``same_bytes``.

    Returns:
        (V,) int32; -1 where no target token begins the text.
    """
    texts, specials = text_ids(target, preferred), special_ids(target)
    longest = max(map(len, texts), default=0)
    found = np.full(source.size, NO_ID, np.int32)
    for token_id, token in enumerate(source.token_bytes):
        if source.is_special[token_id]:
            found[token_id] = specials.get(token, NO_ID)
            continue
        for length in range(min(len(token), longest), 0, -1):
            match = texts.get(token[:length])
            if match is not None:
                found[token_id] = match
                break
    return found


def text_ids(vocabulary: Vocabulary, preferred: Mapping[bytes, int]) -> dict[bytes, int]:
    """Each text of a vocabulary's ordinary tokens, as bytes, with one id: the preferred one where several have the text."""
    texts = {
        token: token_id
        for token_id, token in enumerate(vocabulary.token_bytes)
        if token and not vocabulary.is_special[token_id]
    }
    return {**texts, **preferred}


def special_ids(vocabulary: Vocabulary) -> dict[bytes, int]:
    """Each special token's name (BOS's and EOS's role) with its id."""
    return {
        token: token_id
        for token_id, token in enumerate(vocabulary.token_bytes)
        if token and vocabulary.is_special[token_id]
    }


def same_bytes(vocabulary: Vocabulary) -> dict[bytes, list[int]]:
    """Texts that several tokens of a vocabulary stand for, with their ids: most often a piece and its byte token."""
    ids = defaultdict(list)
    for token_id, token in enumerate(vocabulary.token_bytes):
        if token and not vocabulary.is_special[token_id]:
            ids[token].append(token_id)
    return {token: found for token, found in ids.items() if len(found) > 1}


def _normalised(weights: np.ndarray) -> np.ndarray:
    total = weights.sum(axis=1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


@njit(cache=True)
def _union(
    target_ids: np.ndarray, target_probs: np.ndarray, source_ids: np.ndarray, first_token: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    num_problems, k = target_ids.shape
    n = source_ids.shape[1]
    ids = np.full((num_problems, k + n), NO_ID, np.int32)
    prior = np.zeros((num_problems, k + n))
    for problem in range(num_problems):
        size = 0
        for y in range(k):
            if target_ids[problem, y] != NO_ID:
                ids[problem, size] = target_ids[problem, y]
                prior[problem, size] = target_probs[problem, y]
                size += 1
        if size == 0:
            continue
        added_prior = 0.5 * prior[problem, size - 1]
        for x in range(n):
            if source_ids[problem, x] == NO_ID:
                continue
            token = first_token[source_ids[problem, x]]
            if token == NO_ID:
                continue
            is_new = True
            for y in range(size):
                if ids[problem, y] == token:
                    is_new = False
                    break
            if is_new:
                ids[problem, size] = token
                prior[problem, size] = added_prior
                size += 1
    return ids, prior
