"""Maps from one vocabulary into another: the same text, the longest prefix, the same special token."""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from stages.models.tokenizer import Vocabulary

NO_ID = -1


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


def exact_map(source: Vocabulary, target: Vocabulary, preferred: Mapping[bytes, int]) -> np.ndarray:
    """For each source token the target token of the same bytes.

    BOS and EOS go by role; any other special token only to a special token of the same name.

    Args:
        source: V tokens.
        target: the other vocabulary.
        preferred: bytes -> id, where several target tokens have the same bytes; see ``vocabulary_maps.same_bytes``.

    Returns:
        (V,) int32; -1 where the target has no such token.
    """
    texts, specials = text_ids(target, preferred), special_ids(target)
    return np.array(
        [
            (specials if is_special else texts).get(token, NO_ID)
            for token, is_special in zip(source.token_bytes, source.is_special.tolist(), strict=True)
        ],
        np.int32,
    ).reshape(source.size)
