"""Maps from one vocabulary into another: the same text, the longest prefix, the same special token."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np

from stages.align.first_cuts import Encode, FirstCuts, after_line_break
from stages.models.token_tables import Keep, compute_only
from stages.models.vocabulary import Vocabulary

NO_ID = -1

MAPS_VERSION: Final = 1
"""Of the algorithms behind the maps that a ``ModelPair`` keeps, here and in ``first_cuts`` and ``transport.moved_mass``;
raised when the same vocabularies give other maps."""

_PROBE_CONTEXTS: Final = ("", "\n", "a")
"""Texts before a token to see which of several ids its tokenizer gives it."""


@dataclass(frozen=True, eq=False)
class ModelPair:
    """A source and a target model, as far as costs, supports and hard mappings need them.

    What takes time is computed when it is first asked for, and kept.

    Attributes:
        source: vocabulary of the source.
        target: vocabulary of the target.
        source_texts: text of each source id, decoded.
        target_texts: text of each target id.
        encode: the target's tokenizer.
        encode_source: the source's tokenizer.
        load_embeddings: loads the target's input embeddings, (V of the target or more, H).
        start_mark: at the start of a text, the bytes that every written text has before the text itself: the dummy prefix, or
            nothing; None in the middle of texts.
        encode_first: the target's tokenizer at a start of a message that it would not write so by itself; None: it writes the
            start of any text so.
        encode_source_first: the source's.
        keep: finds a map that was computed before, or computes it; by default it is computed.
    """

    source: Vocabulary
    target: Vocabulary
    source_texts: Sequence[str]
    target_texts: Sequence[str]
    encode: Encode
    encode_source: Encode
    load_embeddings: Callable[[], np.ndarray]
    start_mark: bytes | None = None
    encode_first: Encode | None = None
    encode_source_first: Encode | None = None
    keep: Keep = compute_only

    def at_text_start(
        self, *, source_dummy: bool, target_dummy: bool, source_natural: bool = True, target_natural: bool = True
    ) -> "ModelPair":
        """Return the pair as it is at the first token of a text, where one tokenizer writes a dummy prefix.

        There ``▁The`` of a tokenizer with a dummy prefix is the text that ``The`` is in another: the source's texts are
        written as the target would write them. A chat template with a space before a message has the same effect.

        Args:
            source_dummy: the source writes the first token with a space that the text does not have.
            target_dummy: the target does.
            source_natural: the source's tokenizer does that by itself at the start of any text; False: in a conversation its
                template decided otherwise.
            target_natural: the target's does.
        """
        if source_dummy == target_dummy:
            return self
        key = (target_dummy, source_natural, target_natural)
        if key not in self._at_start:
            pair = self._written_at_start(target_dummy=target_dummy)
            place = "-".join(
                [
                    "start",
                    "target" if target_dummy else "source",
                    *(() if source_natural else ("rendered-source",)),
                    *(() if target_natural else ("rendered-target",)),
                ]
            )
            self._at_start[key] = replace(
                pair,
                keep=lambda name, compute: self.keep(f"{place}-{name}", compute),
                encode_first=None if target_natural else after_line_break(self.encode, has_space=target_dummy),
                encode_source_first=None
                if source_natural
                else after_line_break(self.encode_source, has_space=source_dummy),
            )
        return self._at_start[key]

    @cached_property
    def _at_start(self) -> dict[tuple[bool, bool, bool], "ModelPair"]:
        """Cache of ``at_text_start``, so that several aligners of one pair compute its maps once."""
        return {}

    def _written_at_start(self, *, target_dummy: bool) -> "ModelPair":
        written = tuple(
            token if special or not token else b" " + token if target_dummy else token.removeprefix(b" ")
            for token, special in zip(self.source.token_bytes, self.source.is_special.tolist(), strict=True)
        )
        source = replace(self.source, token_bytes=written)
        texts = [source.text(token_id) for token_id in range(source.size)]
        return replace(
            self,
            source=source,
            source_texts=texts,
            start_mark=b" " if target_dummy else b"",
        )

    @cached_property
    def preferred(self) -> dict[bytes, int]:
        """Token that the tokenizer itself gives a text, for texts that are the bytes of several target tokens."""
        ids = self.keep(
            "preferred", lambda: np.array(list(preferred_tokens(self.target, self.encode).values()), np.int32)
        ).tolist()
        return {self.target.token_bytes[token_id]: token_id for token_id in ids}

    @cached_property
    def exact(self) -> np.ndarray:
        """Target token with the same bytes as each source token, (V of the source,); see ``exact_map``."""
        return self.keep("exact", lambda: exact_map(self.source, self.target, self.preferred))

    @cached_property
    def special_counterpart(self) -> np.ndarray:
        """Target's special token of the same role or name, (V of the source,); -1 if none, and for text."""
        return self.keep("special", lambda: special_map(self.source, self.target))

    @cached_property
    def source_cut(self) -> np.ndarray:
        """Length in bytes of the token with which the target's tokenizer begins each text, (V of the source,).

        See ``FirstCuts``.
        """
        encode = self.encode_first or self.encode
        return self.keep("source-cut", lambda: self._cuts(self.target, encode).of_vocabulary(self.source))

    @cached_property
    def target_cut(self) -> np.ndarray:
        """Length in bytes of the token with which the source's tokenizer begins each text, (V of the target,).

        See ``FirstCuts``.
        """
        encode = self.encode_source_first or self.encode_source
        return self.keep("target-cut", lambda: self._cuts(self.source, encode).of_vocabulary(self.target))

    def _cuts(self, vocabulary: Vocabulary, encode: Encode) -> FirstCuts:
        return FirstCuts(vocabulary, encode, start_mark=self.start_mark)

    @cached_property
    def first_token(self) -> np.ndarray:
        """Target token that begins each source token's text, (V of the source,); see ``prefix_map``."""
        return self.keep("prefix", lambda: prefix_map(self.source, self.target, self.preferred))

    @cached_property
    def writes_mark(self) -> tuple[bool, bool]:
        """Whether the target's and the source's tokenizer by themselves begin a text with a space that it does not have."""
        sides = ((self.encode, self.target), (self.encode_source, self.source))
        target, source = self.keep(
            "marks", lambda: np.array([_writes_mark(*side) for side in sides], np.int32)
        ).tolist()
        return bool(target), bool(source)


def preferred_tokens(vocabulary: Vocabulary, encode: Encode) -> dict[bytes, int]:
    """Return, of several tokens with the same bytes, the one that the tokenizer itself gives the text.

    Args:
        vocabulary: the tokenizer's tokens.
        encode: the tokenizer.

    Returns:
        Bytes -> id; without the bytes that are not text, and those that the tokenizer always cuts otherwise.
    """
    groups = [(token, set(ids)) for token, ids in same_bytes(vocabulary).items() if _is_utf8(token)]
    encodings = iter(encode([context + token.decode() for token, _ in groups for context in _PROBE_CONTEXTS]))
    preferred: dict[bytes, int] = {}
    for token, ids in groups:
        for encoding in [next(encodings) for _ in _PROBE_CONTEXTS]:
            last = int(encoding.ids[-1]) if len(encoding.ids) else NO_ID
            if last in ids:
                preferred.setdefault(token, last)
    return preferred


def prefix_map(source: Vocabulary, target: Vocabulary, preferred: Mapping[bytes, int]) -> np.ndarray:
    """Map each source token to the target token that begins its text.

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
    mapped = np.full(source.size, NO_ID, np.int32)
    for token_id, token in enumerate(source.token_bytes):
        if source.is_special[token_id]:
            mapped[token_id] = specials.get(token, NO_ID)
            continue
        for length in range(min(len(token), longest), 0, -1):
            match = texts.get(token[:length])
            if match is not None:
                mapped[token_id] = match
                break
    return mapped


def text_ids(vocabulary: Vocabulary, preferred: Mapping[bytes, int]) -> dict[bytes, int]:
    """Map the text of each ordinary token, as bytes, to one id: the preferred one if several have the text."""
    texts = {
        token: token_id
        for token_id, token in enumerate(vocabulary.token_bytes)
        if token and not vocabulary.is_special[token_id]
    }
    return {**texts, **preferred}


def special_ids(vocabulary: Vocabulary) -> dict[bytes, int]:
    """Map each special token's name (the role for BOS and EOS) to its id."""
    return {
        token: token_id
        for token_id, token in enumerate(vocabulary.token_bytes)
        if token and vocabulary.is_special[token_id]
    }


def same_bytes(vocabulary: Vocabulary) -> dict[bytes, list[int]]:
    """Map each text that several tokens stand for to their ids: usually a piece and its byte token."""
    ids = defaultdict(list)
    for token_id, token in enumerate(vocabulary.token_bytes):
        if token and not vocabulary.is_special[token_id]:
            ids[token].append(token_id)
    return {token: token_ids for token, token_ids in ids.items() if len(token_ids) > 1}


def exact_map(source: Vocabulary, target: Vocabulary, preferred: Mapping[bytes, int]) -> np.ndarray:
    """Map each source token to the target token with the same bytes.

    BOS and EOS go by role; any other special token only to a special token of the same name.

    Args:
        source: V tokens.
        target: the other vocabulary.
        preferred: bytes -> id, where several target tokens have the same bytes; see ``same_bytes``.

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


def special_map(source: Vocabulary, target: Vocabulary) -> np.ndarray:
    """Map each special token of the source to the target's special token of the same role or name.

    Returns:
        (V of the source,) int32; -1 without, and for text.
    """
    specials = special_ids(target)
    return np.array(
        [
            specials.get(token, NO_ID) if special else NO_ID
            for token, special in zip(source.token_bytes, source.is_special.tolist(), strict=True)
        ],
        np.int32,
    ).reshape(source.size)


def _writes_mark(encode: Encode, vocabulary: Vocabulary) -> bool:
    (encoding,) = encode(["a"])
    written = (vocabulary.token_bytes[i] for i in encoding.ids.tolist() if not vocabulary.is_special[i])
    return next(written, b"").startswith(b" ")


def _is_utf8(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True
