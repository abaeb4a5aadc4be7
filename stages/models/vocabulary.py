"""Vocabulary of a tokenizer: the bytes that each id stands for.

What a tokenizer writes for a space (``▁he``, ``Ġhe``), for a raw byte (``<0x0A>``, ``Ċ``) or for the inside of a word
(``##ing``) is read from the tokenizer's own description, once; after that a token is its bytes.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from stages.models.byte_offsets import METASPACE

BOS_TEXT: Final = b"<bos>"
EOS_TEXT: Final = b"<eos>"
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Meaning of a tokenizer's ids.

    Attributes:
        token_bytes: id -> the token's bytes. A word boundary is one leading space, however the tokenizer writes it; a
            byte token is its byte; tokens of a byte-level tokenizer may be part of a UTF-8 character. A special token
            is its content, except that BOS and EOS are ``b"<bos>"`` and ``b"<eos>"`` (one token in both roles is EOS).
        is_marked: (V,) bool; the token begins with a space that the pairing distance ignores.
        is_special: (V,) bool; the tokenizer declares it special, or no token has this id, or the model's embedding has no
            row for it.
        bos_id: the token in BOS's role (also ``[CLS]`` where there is no other), None if there is none.
        eos_id: the token in EOS's role (also ``[SEP]``), None if there is none.
    """

    token_bytes: tuple[bytes, ...]
    is_marked: np.ndarray
    is_special: np.ndarray
    bos_id: int | None
    eos_id: int | None

    @property
    def size(self) -> int:
        """Number of ids V; larger ids (padded embedding rows) stand for nothing."""
        return len(self.token_bytes)

    def text(self, token_id: int) -> str:
        """Decode a token; bytes that are not UTF-8 become lone surrogates, so that nothing is lost."""
        return self.token_bytes[token_id].decode("utf-8", errors="surrogateescape")


def read_vocabulary(tokenizer: Any, description: dict[str, Any], num_rows: int | None) -> Vocabulary:
    """Read the meaning of each id.

    Args:
        tokenizer: a transformers tokenizer with a fast (Rust) backend.
        description: the content of its tokenizer.json.
        num_rows: number of rows of the model's embedding; ids without a row stand for nothing. None: unknown.
    """
    spelling = _Spelling(tokenizer.backend_tokenizer.decoder, description)
    vocab: dict[str, int] = tokenizer.get_vocab()
    added = {token["id"]: token for token in description["added_tokens"]}
    size = max(len(tokenizer), max(vocab.values(), default=-1) + 1)
    token_bytes: list[bytes] = [b""] * size
    is_special = np.ones(size, np.bool_)  # also for ids without a token, which must never be proposed
    for token, token_id in vocab.items():
        if num_rows is not None and token_id >= num_rows:
            continue
        is_special[token_id] = token_id in added and added[token_id]["special"]
        if is_special[token_id]:
            token_bytes[token_id] = token.encode()
        elif token_id in added:
            token_bytes[token_id] = spelling.with_spaces(token).encode()
        else:
            token_bytes[token_id] = spelling.token_bytes(token)
    bos_id, eos_id = _first_id(tokenizer, "bos", "cls"), _first_id(tokenizer, "eos", "sep")
    for special_id, role in ((bos_id, BOS_TEXT), (eos_id, EOS_TEXT)):
        if special_id is not None:
            token_bytes[special_id], is_special[special_id] = role, True
    is_marked = np.array([piece.startswith(b" ") for piece in token_bytes], np.bool_) & ~is_special
    return Vocabulary(tuple(token_bytes), is_marked, is_special, bos_id, eos_id)


def for_conversations(vocabulary: Vocabulary, spelling: Sequence[bytes], turn_end_id: int) -> Vocabulary:
    """Return the vocabulary of a model that reads conversations.

    EOS is the token that ends the assistant's turns, so that the maps between vocabularies take one model's to the other's.
    BOS, and what else the tokenizer calls EOS, are special tokens without a counterpart.
    """
    token_bytes = list(vocabulary.token_bytes)
    for token_id in {vocabulary.bos_id, vocabulary.eos_id} - {None}:
        assert token_id is not None
        token_bytes[token_id] = spelling[token_id]
    token_bytes[turn_end_id] = EOS_TEXT
    is_special, is_marked = vocabulary.is_special.copy(), vocabulary.is_marked.copy()
    is_special[turn_end_id], is_marked[turn_end_id] = True, False
    return Vocabulary(tuple(token_bytes), is_marked, is_special, None, turn_end_id)


def _first_id(tokenizer: Any, *names: str) -> int | None:
    """Return the id of the first of these special tokens that the tokenizer has."""
    ids = (getattr(tokenizer, f"{name}_token_id", None) for name in names)
    return next((token_id for token_id in ids if token_id is not None), None)


class _Spelling:
    """Rules by which a tokenizer writes bytes, spaces and the inside of words in its tokens."""

    def __init__(self, decoder: Any, description: dict[str, Any]) -> None:
        model = description["model"]
        components = [
            component
            for name in ("normalizer", "pre_tokenizer", "decoder")
            for component in _components(description.get(name))
        ]
        kinds = {component["type"] for component in components}
        self._is_byte_level = "ByteLevel" in kinds
        self._byte_of = _byte_level_alphabet() if self._is_byte_level else {}
        self._has_byte_tokens = "ByteFallback" in kinds or bool(model.get("byte_fallback"))
        self._spaces = {component["replacement"] for component in components if component["type"] == "Metaspace"} | {
            METASPACE
            for component in components
            if component["type"] == "Replace"
            and METASPACE in (component["content"], component["pattern"].get("String"))
        }
        self._inside = model.get("continuing_subword_prefix") or ""
        self._word_end = model.get("end_of_word_suffix") or ""
        self._decoder = decoder if "WordPiece" in kinds else None

    def with_spaces(self, token: str) -> str:
        """Replace the token's word-boundary characters by spaces."""
        for mark in self._spaces:
            token = token.replace(mark, " ")
        return token

    def token_bytes(self, token: str) -> bytes:
        """Return the bytes of a token of the model's own vocabulary (not an added token)."""
        byte_token = _BYTE_TOKEN.fullmatch(token) if self._has_byte_tokens else None
        if byte_token:
            return bytes([int(byte_token[1], 16)])
        if self._is_byte_level and all(character in self._byte_of for character in token):
            return bytes(self._byte_of[character] for character in token)
        if self._inside and token.startswith(self._inside):
            return token.removeprefix(self._inside).encode()
        if self._decoder is not None:
            # A WordPiece token begins a word: a space goes before it, except where its own decoder puts none (", ").
            joined = self._decoder.decode(["a", token])
            return joined[1:].encode() if joined.startswith("a") else token.encode()
        return self.with_spaces(token).removesuffix(self._word_end).encode()


def _components(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the components of a tokenizer.json, with sequences flattened."""
    if component is None:
        return
    for name in ("normalizers", "pretokenizers", "decoders"):
        for child in component.get(name, ()):
            yield from _components(child)
    yield component


def _byte_level_alphabet() -> dict[str, int]:
    """Return the characters in which byte-level tokenizers write the 256 bytes (GPT-2's bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
