"""Shard stage: a range of documents becomes segments that fit every tokenizer of the run."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from stages.contract.roles import TURN_END
from stages.contract.schemas import SHARD, shard_schema
from stages.contract.stage import BadRecord, StageOutput
from stages.models.config import ModelConfig
from stages.models.control_tokens import ControlTokens
from stages.models.segment_text import Message
from stages.models.tokenizer import SegmentTokenizer
from stages.shard.config import (
    CONTROL_TOKEN,
    CONTROL_TOKEN_DOCUMENTS,
    QUARANTINED,
    UNLEARNT_CONVERSATIONS,
    ShardConfig,
)
from stages.shard.conversations import (
    ConversationError,
    Piece,
    canonical_bytes,
    cut_conversations,
    read_conversation,
)
from stages.shard.cut import CutError, cut_document

_SHORT_CHARACTERS_PER_TOKEN = 8
"""A document longer than this many characters for each of max_length tokens is not tried whole."""
_CONVERSATIONS_AT_A_TIME = 256
"""Conversations that are tokenized together: bounds the memory of what is known of their tokens."""


@dataclass(frozen=True)
class _Document:
    doc_id: int
    text: str
    raw: bytes


class ShardStage:
    """Stage that cuts documents; the same documents always give the same rows."""

    def __init__(
        self,
        config: ShardConfig,
        models: tuple[ModelConfig, ...],
        *,
        train_on: Literal["assistant", "all"] = "assistant",
    ) -> None:
        """Keep the settings; tokenizers are loaded by ``setup``.

        Args:
            config: the stage's settings.
            models: every model of the run, the target first; only their tokenizers are used. Documents are conversations if
                the models read these.
            train_on: messages of conversations to train on.
        """
        self._config = config
        self._train_on = train_on
        self._models = models
        self._tokenizers: tuple[SegmentTokenizer, ...] = ()
        self._control_tokens = ControlTokens(())

    def setup(self) -> None:
        """Load every tokenizer.

        Raises:
            ValueError: one cannot give byte offsets.
        """
        self._tokenizers = tuple(SegmentTokenizer.load(model) for model in self._models)
        split = [model.control_tokens == "split" for model in self._models]
        self._control_tokens = ControlTokens(
            content
            for tokenizer, is_split in zip(self._tokenizers, split, strict=True)
            if is_split
            for content in tokenizer.control_tokens
        )

    def run(self, inputs: Mapping[str, pa.Table]) -> StageOutput:
        """Cut one shard's documents.

        Args:
            inputs: ``"documents"``: doc_id int64, text large_binary (UTF-8; of conversations JSON, see ``read_conversation``),
                null where there is none; optionally error string, why a record could not be read (its text is then null).

        Returns:
            The segments in the schema ``schemas.shard_schema``; ``num_tokens`` counts the first model's, ``health`` every
            model's. A document that is empty, or only whitespace, gives no row and is counted as ``empty_documents``.
            Documents that hold the text of a control token, which is split like any other text, are counted as
            ``control_token_documents``, and for each such token as ``control_token/<token>``. Of conversations, those of which
            nothing is learnt give no row and are counted as ``unlearnt_conversations``, and those in quarantine as
            ``quarantined/<reason>``.
        """
        bad: list[BadRecord] = []
        if self._models[0].reads_conversations:
            return self._run_conversations(inputs["documents"], bad)
        documents = []
        num_empty = 0
        for document in _decode(inputs["documents"], bad):
            if document.text.isspace() or not document.text:
                num_empty += 1
            else:
                documents.append(document)
        segments, counts = self._cut(documents, bad)
        tokens = dict(zip((model.name for model in self._models), counts, strict=True))
        table, health = self._table(documents, segments)
        return StageOutput(
            table=table,
            num_tokens=tokens[self._models[0].name],
            health={
                **health,
                "empty_documents": num_empty,
                **{f"tokens/{name}": count for name, count in tokens.items()},
                **self._count_control_tokens(documents),
            },
            quarantine=tuple(sorted(bad, key=lambda record: record.doc_id)),
        )

    def _count_control_tokens(self, documents: Sequence[_Document]) -> dict[str, int]:
        """Count documents that hold the text of control tokens; no figures where there is none."""
        return self._count_found([self._control_tokens.find(document.text) for document in documents])

    def _count_found(self, tokens_by_document: Sequence[set[str]]) -> dict[str, int]:
        """Count the control tokens that were found in each document."""
        counts = Counter(token for tokens in tokens_by_document for token in tokens)
        if not counts:
            return {}
        of_tokens = {f"{CONTROL_TOKEN}{token}": count for token, count in counts.items()}
        return {CONTROL_TOKEN_DOCUMENTS: sum(map(bool, tokens_by_document)), **of_tokens}

    def _run_conversations(self, table: pa.Table, bad: list[BadRecord]) -> StageOutput:
        """Cut one shard's conversations; see ``run``."""
        conversations: dict[int, tuple[Message, ...]] = {}
        num_empty = num_unlearnt = 0
        for doc_id, raw in _raw_documents(table, bad, "the messages column is null in this record"):
            try:
                messages = read_conversation(raw, self._train_on)
            except ConversationError as error:
                bad.append(BadRecord(doc_id, -1, error.kind, str(error)))
                continue
            if not any(message.content.strip() for message in messages):
                num_empty += 1
            elif not any(message.is_trained for message in messages):
                num_unlearnt += 1
            else:
                conversations[doc_id] = messages
        pieces: dict[int, list[Piece]] = {}
        names = [model.name for model in self._models]
        ids = list(conversations)
        for first in range(0, len(ids), _CONVERSATIONS_AT_A_TIME):
            batch = ids[first : first + _CONVERSATIONS_AT_A_TIME]
            cut = cut_conversations(
                [conversations[doc_id] for doc_id in batch], self._tokenizers, self._config.max_length, names
            )
            for doc_id, result in zip(batch, cut, strict=True):
                if isinstance(result, ConversationError):
                    bad.append(BadRecord(doc_id, -1, result.kind, str(result)))
                else:
                    pieces[doc_id] = result
        tokens = {
            name: sum(piece.num_tokens[index] for document_pieces in pieces.values() for piece in document_pieces)
            for index, name in enumerate(names)
        }
        segments, health = self._conversation_table(conversations, pieces)
        kinds = Counter(record.error for record in bad)
        return StageOutput(
            table=segments,
            num_tokens=tokens[names[0]],
            health={
                **health,
                "empty_documents": num_empty,
                UNLEARNT_CONVERSATIONS: num_unlearnt,
                **{f"{QUARANTINED}{kind}": kinds[kind] for kind in sorted(kinds)},
                **{f"tokens/{name}": count for name, count in tokens.items()},
                **self._count_found(
                    [
                        set().union(*(self._control_tokens.find(message.content) for message in messages))
                        for messages in conversations.values()
                    ]
                ),
            },
            quarantine=tuple(sorted(bad, key=lambda record: record.doc_id)),
        )

    def _conversation_table(
        self, conversations: Mapping[int, tuple[Message, ...]], pieces: Mapping[int, list[Piece]]
    ) -> tuple[pa.Table, dict[str, int]]:
        rows = []
        for doc_id, document_pieces in pieces.items():
            raw = canonical_bytes(conversations[doc_id])
            split = _split(raw, self._config.validation_fraction, self._config.test_fraction)
            for index, piece in enumerate(document_pieces):
                messages = piece.text.messages
                ends = np.cumsum([len((message.content + TURN_END).encode()) for message in messages]).tolist()
                rows.append(
                    {
                        "doc_id": doc_id,
                        "segment": index,
                        "split": split,
                        "byte_start": piece.byte_start,
                        "is_last": piece.text.is_last,
                        "text": piece.text.text,
                        "message_role": [message.role for message in messages],
                        "message_end": ends,
                        "message_trained": [message.is_trained for message in messages],
                    }
                )
        num_bytes = sum(piece.num_new_bytes for document_pieces in pieces.values() for piece in document_pieces)
        figures = self._figures([row["split"] for row in rows], num_documents=len(pieces), num_bytes=num_bytes)
        return pa.Table.from_pylist(rows, schema=shard_schema(conversations=True)), figures

    def _figures(self, splits: list[str], *, num_documents: int, num_bytes: int) -> dict[str, int]:
        """Count the documents and segments of a shard; ``splits`` has one entry per segment."""
        num_train, num_test = splits.count("train"), splits.count("test")
        return {
            "documents": num_documents,
            "segments": len(splits),
            "train_segments": num_train,
            "validation_segments": len(splits) - num_train - num_test,
            **({"test_segments": num_test} if self._config.test_fraction else {}),
            "bytes": num_bytes,
        }

    def _cut(self, documents: Sequence[_Document], bad: list[BadRecord]) -> tuple[dict[int, list[str]], list[int]]:
        """Cut documents into segments by doc_id, and count their tokens over all tokenizers; adds to ``bad``.

        Documents that fit whole are only counted.
        """
        measures = [tokenizer.measure for tokenizer in self._tokenizers]
        has_eos = np.array([tokenizer.vocabulary.eos_id is not None for tokenizer in self._tokenizers], np.int64)
        whole, counts = self._fit_whole(documents)
        segments: dict[int, list[str]] = {}
        for document in documents:
            if document.doc_id in whole:
                segments[document.doc_id] = [document.text]
                continue
            try:
                cut = cut_document(document.text, measures, self._config.max_length)
            except CutError as error:
                bad.append(BadRecord(document.doc_id, -1, "CannotCut", str(error)))
                continue
            segments[document.doc_id] = cut.segments
            counts = counts + cut.num_tokens + has_eos
        return segments, counts.tolist()

    def _fit_whole(self, documents: Sequence[_Document]) -> tuple[set[int], np.ndarray]:
        """Find the documents that are one segment, by doc_id, and their tokens over all tokenizers, int64."""
        limit = self._config.max_length
        short = [doc for doc in documents if len(doc.text) <= limit * _SHORT_CHARACTERS_PER_TOKEN]
        counts = np.array(
            [tokenizer.count_batch([doc.text for doc in short]) for tokenizer in self._tokenizers], np.int64
        ).reshape(len(self._tokenizers), len(short))
        fewest = np.array([tokenizer.num_special for tokenizer in self._tokenizers])[:, None]
        fits: np.ndarray = np.all((counts <= limit) & (counts > fewest), axis=0)
        whole = {doc.doc_id for doc, fit in zip(short, fits, strict=True) if fit}
        return whole, counts[:, fits].sum(axis=1)

    def _table(
        self, documents: Sequence[_Document], segments: Mapping[int, list[str]]
    ) -> tuple[pa.Table, dict[str, int]]:
        columns: dict[str, list] = {name: [] for name in SHARD.names}
        num_bytes = 0
        for document in documents:
            texts = segments.get(document.doc_id, [])
            split = _split(document.raw, self._config.validation_fraction, self._config.test_fraction)
            byte_start = 0
            for index, text in enumerate(texts):
                row = (document.doc_id, index, split, byte_start, index == len(texts) - 1, text)
                for name, value in zip(SHARD.names, row, strict=True):
                    columns[name].append(value)
                byte_start += len(text.encode())
            num_bytes += byte_start
        figures = self._figures(columns["split"], num_documents=len(segments), num_bytes=num_bytes)
        return pa.table(columns, schema=SHARD), figures


def _raw_documents(table: pa.Table, bad: list[BadRecord], null: str) -> Iterator[tuple[int, bytes]]:
    """Yield the documents that there are, with their number; the others go to ``bad``. ``null``: what a null means."""
    errors = table["error"].to_pylist() if "error" in table.schema.names else [None] * table.num_rows
    for doc_id, raw, error in zip(table["doc_id"].to_pylist(), table["text"].to_pylist(), errors, strict=True):
        if error is not None:
            bad.append(BadRecord(doc_id, -1, "BadRecordLine", error))
        elif raw is None:
            bad.append(BadRecord(doc_id, -1, "NullText", null))
        else:
            yield doc_id, raw


def _decode(table: pa.Table, bad: list[BadRecord]) -> list[_Document]:
    """Decode the documents that are text; the others go to ``bad``."""
    documents = []
    for doc_id, raw in _raw_documents(table, bad, "the text column is null in this record"):
        try:
            documents.append(_Document(doc_id, raw.decode("utf-8"), raw))
        except UnicodeDecodeError as problem:
            message = f"not UTF-8 at byte {problem.start} of {len(raw)}: {raw[problem.start : problem.end]!r}, {problem.reason}"
            bad.append(BadRecord(doc_id, -1, "InvalidUtf8", message))
    return documents


def _split(raw: bytes, validation_fraction: float, test_fraction: float) -> str:
    """Assign a document to a split based only on its bytes, so that equal documents are never in two splits."""
    share = int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") / 2**64
    if share < validation_fraction:
        return "validation"
    return "test" if share < validation_fraction + test_fraction else "train"
