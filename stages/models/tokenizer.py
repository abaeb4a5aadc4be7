"""Tokenizer of a model as every stage uses it: the tokens of a text, and where each of them ends in its bytes."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from stages.models.byte_offsets import ends_by_bytes, ends_by_offsets
from stages.models.config import PLAIN, ModelConfig, embedding_rows, load_tokenizer
from stages.models.conversations.encoder import ConversationEncoder, EncodedConversation
from stages.models.conversations.template import ChatTemplate, RenderError, plain_template
from stages.models.segment_text import Message, SegmentText
from stages.models.vocabulary import for_conversations, read_vocabulary

_PROBE: Final = "The Cat  sat\n\ton 3 mats. 日本 é😀 "
_BATCH_CHARACTERS: Final = 4_000_000
"""Characters tokenized at a time: bounds the memory of the tokenizer's own records (about 100 bytes per token)."""


@dataclass(frozen=True, eq=False)
class Encoding:
    """Tokens of one text.

    Attributes:
        ids: (N,) int32.
        byte_end: (N,) int32; where each token ends in the text, UTF-8 bytes; nondecreasing. The prefix ends at 0; the last
            token of the text, and EOS after it, end at the text's length. A text of which a tokenizer keeps nothing
            (white space under WordPiece) has no tokens but these two.
        role: (N,) uint8, values of ``stages.contract.roles.Role``; None for plain text.
        is_trained: (N,) bool, the token is trained on; None for plain text, where all tokens are.
    """

    ids: np.ndarray
    byte_end: np.ndarray
    role: np.ndarray | None = None
    is_trained: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Measured:
    """Measured tokens of a text, whose number is usually all that is needed: with the prefix if there is one, without EOS.

    Attributes:
        num_tokens: number of tokens, including the prefix.
        keeps_text: there is a token other than the prefix; a tokenizer may drop a whole text (whitespace under
            WordPiece).
        byte_end: () -> (num_tokens,) int32, as in ``Encoding``; computed when it is called.
    """

    num_tokens: int
    keeps_text: bool
    byte_end: Callable[[], np.ndarray]


MAX_LOADED: Final = 8
"""Number of tokenizers that a process caches."""

_LOADED: Final[dict[Any, Any]] = {}


class SegmentTokenizer:
    """Tokenizer of a model, which writes the prefix, the text's tokens, and EOS where a document ends.

    The prefix is what the model has seen before a text, so that it predicts the text's first token: BOS where the model
    uses it, else EOS, which separates documents in the training text of models without BOS (``prefix_id``). A model that
    has neither is not asked for the first token.

    A special token's name inside a text (a page that explains ``</s>``) is text and is tokenized as text, unless it is asked
    for as the token (``parses_control_tokens``). One family cannot: a Unigram vocabulary holds the name as a piece and finds
    it; ``byte_end`` is exact there as well.

    Attributes:
        control_tokens: the texts of its special tokens.
        chat_template: the Jinja template that conversations are rendered with, instead of the tokenizer's own; None where
            that is used.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        bos: bool | None,
        parses_control_tokens: bool = False,
        num_rows: int | None = None,
        chat_template: str | None = None,
        reads_conversations: bool = False,
    ) -> None:
        """Wrap a transformers tokenizer.

        Args:
            tokenizer: tokenizer with a fast (Rust) backend; it is copied, not changed.
            bos: prepend BOS? None: if the tokenizer does so itself for a plain text.
            parses_control_tokens: a special token's name inside a text is that token.
            num_rows: number of rows of the model's embedding; tokens without a row are never used. None: unknown.
            chat_template: a Jinja template, or ``"plain"``; None: the tokenizer's own.
            reads_conversations: segments are conversations.

        Raises:
            ValueError: this tokenizer gives no offsets, or BOS is requested and it has none, or conversations cannot be
                rendered.
        """
        description = _describe(tokenizer)
        self._backend = _copy_backend(tokenizer.backend_tokenizer, description)
        self._backend.encode_special_tokens = not parses_control_tokens
        parsed = json.loads(description)  # takes half a second for a large vocabulary
        self.vocabulary = read_vocabulary(tokenizer, parsed, num_rows)
        special = {token["id"]: token["content"] for token in parsed["added_tokens"] if token["special"]}
        self.control_tokens = frozenset(special.values())
        # The vocabulary stores the roles of BOS and EOS; inside a text they are their names.
        self._spelling = list(self.vocabulary.token_bytes)
        for token_id, content in special.items():
            self._spelling[token_id] = content.encode()
        if bos and self.vocabulary.bos_id is None:
            raise ValueError(f"`bos = true`, but {type(tokenizer).__name__} has no BOS token: remove `bos`")
        uses_bos = _prepends_bos(tokenizer, self.vocabulary.bos_id) if bos is None else bos
        self.prefix_id: int | None = self.vocabulary.bos_id if uses_bos else self.vocabulary.eos_id
        self._conversations: ConversationEncoder | None = None
        self.chat_template: str | None = None
        if reads_conversations:
            jinja = self.chat_template = plain_template(bos=uses_bos) if chat_template == PLAIN else chat_template
            self._conversations = ConversationEncoder(
                ChatTemplate(tokenizer, jinja),
                lambda: _copy_backend(tokenizer.backend_tokenizer, description),
                self._spelling,
            )
            self.vocabulary = for_conversations(self.vocabulary, self._spelling, self._conversations.turn_end_id)
            self.prefix_id = self._conversations.first_id
        self.has_dummy_prefix: bool = self._writes_dummy_prefix()
        probe = self._backend.encode(_PROBE, add_special_tokens=False)
        self.spells_text: bool = ends_by_bytes(_PROBE.encode(), self._pieces(probe.ids)) is not None

    @classmethod
    def load(cls, model: ModelConfig) -> Self:
        """Load a model's tokenizer; never its weights. The last few are remembered: large vocabularies take seconds.

        Raises:
            ValueError: the tokenizer cannot give byte offsets; names the model.
        """
        key = (cls, model.model_dump_json(), model.tokenizer_identity())
        if key not in _LOADED:
            loaded = load_tokenizer(model)
            try:
                _LOADED[key] = cls(
                    loaded,
                    bos=model.bos,
                    parses_control_tokens=model.control_tokens == "parse",
                    num_rows=embedding_rows(model),
                    chat_template=_read_template(model.chat_template),
                    reads_conversations=model.reads_conversations,
                )
            except ValueError as error:
                raise ValueError(f"model {model.name}: {error}") from error
            while len(_LOADED) > MAX_LOADED:
                del _LOADED[next(iter(_LOADED))]
        return _LOADED[key]

    def encode(self, text: str, *, is_last: bool) -> Encoding:
        """Tokenize one text; see ``encode_batch``."""
        return self.encode_batch([text], is_last=[is_last])[0]

    def encode_batch(self, texts: Sequence[str], *, is_last: Sequence[bool]) -> list[Encoding]:
        """Tokenize texts, in parallel on the machine's cores.

        Args:
            texts: without lone surrogates.
            is_last: for each text, whether a document ends there: EOS is appended.
        """
        encodings = []
        for batch in _slices(texts):
            batch_texts = texts[batch]
            encodings += [
                self._with_special(text, ids, byte_end, last)
                for text, (ids, byte_end), last in zip(
                    batch_texts, self._tokenize(batch_texts), is_last[batch], strict=True
                )
            ]
        return encodings

    def encode_segments(self, segments: Sequence[SegmentText]) -> list[Encoding]:
        """Tokenize segments as ``segment_texts`` reads them: conversations with the chat template, texts as ``encode_batch``.

        Raises:
            RenderError: the template cannot render a conversation; ``shard`` lets none through.
            ValueError: a segment is a conversation, and this tokenizer reads texts.
        """
        encodings = self.try_encode_segments(segments)
        failed = next((encoding for encoding in encodings if isinstance(encoding, RenderError)), None)
        if failed is not None:
            raise failed
        return [encoding for encoding in encodings if isinstance(encoding, Encoding)]

    def try_encode_segments(self, segments: Sequence[SegmentText]) -> list[Encoding | RenderError]:
        """Tokenize as ``encode_segments`` does, but return the error of a conversation that cannot be rendered in its place.

        Raises:
            ValueError: a segment is a conversation, and this tokenizer reads texts.
        """
        talks = [index for index, segment in enumerate(segments) if segment.messages]
        texts = [index for index, segment in enumerate(segments) if not segment.messages]
        done: dict[int, Encoding | RenderError] = dict(
            zip(
                texts,
                self.encode_batch([segments[i].text for i in texts], is_last=[segments[i].is_last for i in texts]),
                strict=True,
            )
        )
        if talks and self._conversations is None:
            raise ValueError("conversations need a tokenizer that renders them (`reads_conversations` of its model)")
        if self._conversations is not None:
            for index, conversation in zip(
                talks, self._conversations.encode([segments[i].messages for i in talks]), strict=True
            ):
                done[index] = conversation if isinstance(conversation, RenderError) else _encoding(conversation)
        return [done[index] for index in range(len(segments))]

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a text's own tokens, without prefix and EOS."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, including special ones as if a document ended there."""
        return self.count_batch([text])[0]

    def count_batch(self, texts: Sequence[str]) -> list[int]:
        """Return ``count`` of each text."""
        num_special = self.num_special
        return [
            len(encoding) + num_special
            for batch in _slices(texts)
            for encoding in self._backend.encode_batch_fast(texts[batch], add_special_tokens=False)
        ]

    def measure(self, text: str) -> Measured:
        """Tokenize a text in which no document ends; the ends of its tokens are computed only when needed."""
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)

        def byte_end() -> np.ndarray:
            ends = ends_by_bytes(text.encode(), self._pieces(encoding.ids)) if self.spells_text else None
            if ends is None:
                ((_, ends),) = self._tokenize_with_offsets([text])
            return self._with_special(text, encoding.ids, ends, is_last=False).byte_end

        return Measured(len(encoding) + self.num_prefix, len(encoding) > 0, byte_end)

    @property
    def num_prefix(self) -> int:
        """Number of tokens before every text: 1, or 0 for a model without BOS and EOS."""
        return int(self.prefix_id is not None)

    @property
    def num_special(self) -> int:
        """Number of special tokens of a text at which a document ends: prefix and EOS, if the model has them."""
        return self.num_prefix + int(self.vocabulary.eos_id is not None)

    def _writes_dummy_prefix(self) -> bool:
        """Return whether a text's first token is written with a space that the text does not have (``▁The``).

        Of conversations: that of the assistant's message. The space may be the template's (``[/INST] The``).
        """
        if self._conversations is not None:
            messages = tuple(Message(role, "a", is_trained=role == "assistant") for role in ("user", "assistant"))
            (encoding,) = self.encode_segments([SegmentText.conversation(messages)])
            assert encoding.is_trained is not None
            first = encoding.ids[int(np.argmax(encoding.is_trained))]
            return self.vocabulary.token_bytes[first].startswith(b" ")
        ids = self._backend.encode("a", add_special_tokens=False).ids
        return bool(ids) and self.vocabulary.token_bytes[ids[0]].startswith(b" ")

    def _pieces(self, ids: Sequence[int]) -> list[bytes]:
        return list(map(self._spelling.__getitem__, ids))

    def _tokenize(self, texts: Sequence[str]) -> list[tuple[list[int], np.ndarray]]:
        """Compute ids and byte ends of each text's own tokens.

        Offsets double the cost, so they are computed only if needed.
        """
        done: dict[int, tuple[list[int], np.ndarray]] = {}
        if self.spells_text:
            for index, encoding in enumerate(self._backend.encode_batch_fast(texts, add_special_tokens=False)):
                byte_end = ends_by_bytes(texts[index].encode(), self._pieces(encoding.ids))
                if byte_end is not None:
                    done[index] = (encoding.ids, byte_end)
        rest = [index for index in range(len(texts)) if index not in done]
        if rest:
            done |= zip(rest, self._tokenize_with_offsets([texts[index] for index in rest]), strict=True)
        return [done[index] for index in range(len(texts))]

    def _tokenize_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], np.ndarray]]:
        records = self._backend.encode_batch(texts, add_special_tokens=False)
        return [(encoding.ids, self._ends(text, encoding)) for text, encoding in zip(texts, records, strict=True)]

    def _ends(self, text: str, encoding: Any) -> np.ndarray:
        if not encoding.ids:
            return np.zeros(0, np.int64)
        pieces = self._pieces(encoding.ids)
        exact = ends_by_bytes(text.encode(), pieces)
        return ends_by_offsets(text, pieces, encoding.offsets) if exact is None else exact

    def _with_special(self, text: str, ids: list[int], byte_end: np.ndarray, is_last: bool) -> Encoding:
        start = [] if self.prefix_id is None else [self.prefix_id]
        end = [self.vocabulary.eos_id] if is_last and self.vocabulary.eos_id is not None else []
        return Encoding(
            ids=np.array([*start, *ids, *end], np.int32),
            byte_end=np.concatenate([[0] * len(start), byte_end, [len(text.encode())] * len(end)]).astype(np.int32),
        )


def _read_template(chat_template: str | None) -> str | None:
    """Return the text of a template's file; other values are returned unchanged.

    Raises:
        ValueError: the file cannot be read.
    """
    if chat_template in (None, PLAIN):
        return chat_template
    try:
        return Path(str(chat_template)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"its chat template cannot be read: {error} (expected chat_template = a Jinja file in UTF-8, or 'plain')"
        ) from error


def _encoding(conversation: EncodedConversation) -> Encoding:
    coordinates = conversation.coordinates
    return Encoding(
        np.array(conversation.ids, np.int32), coordinates.byte_end, coordinates.role, coordinates.is_trained
    )


def _slices(texts: Sequence[str]) -> Iterator[slice]:
    """Yield slices of texts of bounded total length; a longer text has a separate slice."""
    start = characters = 0
    for index, text in enumerate(texts):
        if index > start and characters + len(text) > _BATCH_CHARACTERS:
            yield slice(start, index)
            start, characters = index, 0
        characters += len(text)
    if start < len(texts):
        yield slice(start, len(texts))


def _describe(tokenizer: Any) -> str:
    """Return the tokenizer's description of itself: the text of a tokenizer.json."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise ValueError(
            f"{type(tokenizer).__name__} has no fast (Rust) backend, so byte offsets of its tokens cannot be computed; give "
            "`tokenizer` a folder or hub id that holds a tokenizer.json"
        )
    try:
        return backend.to_str()
    except Exception as error:  # the library raises plain Exception: a component is Python code
        raise ValueError(
            f"{type(tokenizer).__name__} cannot be described as a tokenizer.json ({error}), so byte offsets of its tokens "
            "cannot be trusted; give `tokenizer` a folder or hub id that holds a tokenizer.json"
        ) from error


def _copy_backend(original: Any, description: str) -> Any:
    """Copy the backend for our own use: without truncation, padding or special tokens, and with untrimmed offsets."""
    from tokenizers import Tokenizer

    copy = _share_unigram(original) if type(original.model).__name__ == "Unigram" else None
    backend = copy or Tokenizer.from_str(description)
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None
    backend.encode_special_tokens = True
    return backend


def _share_unigram(original: Any) -> Any | None:
    """Copy a backend around the same Unigram model.

    Reading a description back shifts scores by a bit, which would break ties differently.

    None if added tokens cannot be given the same ids again.
    """
    from tokenizers import Tokenizer

    copy = Tokenizer(original.model)
    if original.normalizer is not None:
        copy.normalizer = original.normalizer
    if original.pre_tokenizer is not None:
        copy.pre_tokenizer = original.pre_tokenizer
    added = original.get_added_tokens_decoder()
    copy.add_tokens([added[token_id] for token_id in sorted(added)])
    same = {token_id: repr(token) for token_id, token in copy.get_added_tokens_decoder().items()} == {
        token_id: repr(token) for token_id, token in added.items()
    }
    return copy if same else None


def _prepends_bos(tokenizer: Any, bos_id: int | None) -> bool:
    """Return whether the tokenizer itself begins a plain text with BOS."""
    return bos_id is not None and tokenizer("a")["input_ids"][:1] == [bos_id]
