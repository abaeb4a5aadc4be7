"""Parquet schemas of a run: columns, units, which stage writes and which stages read them.

A row is a segment of text (``fuse``: a training block). Shard 17 of every stage speaks of the same text, in the same
order: the rows of ``logits/*`` and ``align/*`` are the train rows of ``shard``, less what went to quarantine.
``doc_id`` and ``segment`` say which is which.
"""

from typing import Any, Final, Literal

import pyarrow as pa

Tail = Literal["renormalise", "bucket"]

SHARD: Final = pa.schema(
    [
        pa.field("doc_id", pa.int64(), nullable=False),  # index of the document in the dataset
        pa.field("segment", pa.int32(), nullable=False),  # index of the segment in its document, from 0
        pa.field("split", pa.string(), nullable=False),  # "train" | "validation" | "test", by the document's hash
        pa.field("byte_start", pa.int64(), nullable=False),  # where the segment begins in its document, UTF-8 bytes
        pa.field("is_last", pa.bool_(), nullable=False),  # the document ends here: EOS is appended
        pa.field("text", pa.string(), nullable=False),  # a document's segments concatenate to exactly its text
    ]
)
"""Written by shard; read by logits (train rows) and by eval (held-out rows)."""


def shard_schema(*, conversations: bool = False) -> pa.Schema:
    """Return the schema that ``shard`` writes: ``SHARD``, and for conversations what their messages are.

    A document is a conversation then, and a segment is one or several of its messages, whole. ``text`` holds each message's
    content and after it one character, ``roles.TURN_END``, the virtual byte that says "end of turn". For M messages:

    - ``message_role`` (M): "system", "user" or "assistant".
    - ``message_end`` (M): where each message ends in ``text``, bytes, its virtual byte included; the last is the length.
    - ``message_trained`` (M): the message is trained on.

    A piece that continues a conversation begins with the conversation's system message again, if it has one, which is not
    trained on again. ``byte_start`` is that of the first message that is not repeated, and bytes of a document are
    counted without repetition.
    """
    if not conversations:
        return SHARD
    return pa.schema(
        [
            *SHARD,
            pa.field("message_role", pa.list_(pa.string()), nullable=False),
            pa.field("message_end", pa.list_(pa.int32()), nullable=False),
            pa.field("message_trained", pa.list_(pa.bool_()), nullable=False),
        ]
    )


def has_conversations(schema: pa.Schema) -> bool:
    """Return whether a table of ``shard`` holds conversations."""
    return "message_role" in schema.names


QUARANTINE: Final = pa.schema(
    [
        pa.field("doc_id", pa.int64(), nullable=False),
        pa.field("segment", pa.int32(), nullable=False),  # -1: the document as a whole
        pa.field("stage", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
    ]
)
"""Written by every sharded stage for the records it could not process; read by people."""


def id_type(vocab_size: int) -> pa.DataType:
    """Return the narrowest unsigned type that holds every id of a vocabulary."""
    return pa.uint16() if vocab_size <= 2**16 else pa.uint32()


def _sparse(vocab_size: int) -> list[pa.Field]:
    return [
        pa.field("topk_ids", pa.list_(pa.list_(id_type(vocab_size))), nullable=False),
        pa.field("topk_logprobs", pa.list_(pa.list_(pa.float32())), nullable=False),
    ]


_IS_TRAINED: Final = pa.field("is_trained", pa.list_(pa.bool_()), nullable=False)
_KEYS: Final = [SHARD.field("doc_id"), SHARD.field("segment")]


def logits_schema(vocab_size: int, *, has_draws: bool = False, conversations: bool = False) -> pa.Schema:
    """Return the schema of ``logits/<model>``: one row per train segment of N tokens.

    ``logits`` writes it; ``align`` and ``fuse`` read it.

    - ``token_ids`` (N): the segment's tokens, special tokens included.
    - ``byte_end`` (N): where each token ends in the segment, bytes; BOS ends at 0; nondecreasing; the last is the length.
    - ``gold_logprob`` (N): ln p(token t+1 | tokens <= t), whether that token is in the top-k or not; null at the last
      position.
    - ``topk_ids``, ``topk_logprobs`` (N, <= k): the largest entries at each position, descending; natural logs over the
      full vocabulary (every id that the tokenizer has). What they leave out of 1 is the tail mass.
    - ``sample_ids`` (N, m or 0), only with ``has_draws`` (``logits.tail_samples`` = m > 0): tokens drawn from the ids that the
      top-k leave out, in proportion to their probability; ascending, a token that was drawn twice stands there twice. Each
      stands for tail mass / m (``stages.contract.draws``). Empty where the other ids have no probability.
    - ``role`` (N), only with ``conversations``: values of ``stages.contract.roles.Role``. ``byte_end`` counts the bytes of
      ``text`` in ``shard_schema``: those of all contents, and the virtual byte after each, which the token that ends the turn
      owns. Tokens of the chat template have no bytes. Plain corpora have no such column: read it with ``roles.roles_of``.
    - ``is_trained`` (N), only with ``conversations``: the token itself is trained on.

    Logprobs are rounded to float16's precision, to the nearest: a token's gold logprob moves by at most 1 part in 2,048,
    the mean over a thousand tokens by about 1e-5 nats.
    """
    return pa.schema(
        [
            *_KEYS,
            pa.field("token_ids", pa.list_(id_type(vocab_size)), nullable=False),
            pa.field("byte_end", pa.list_(pa.int32()), nullable=False),
            pa.field("gold_logprob", pa.list_(pa.float32()), nullable=False),
            *_sparse(vocab_size),
            *([pa.field("sample_ids", pa.list_(pa.list_(id_type(vocab_size))), nullable=False)] if has_draws else []),
            *([pa.field("role", pa.list_(pa.uint8()), nullable=False), _IS_TRAINED] if conversations else []),
        ]
    )


PAIRED_BY: Final = ("none", "transport", "gold", "identity", "condition")
"""Meaning of ``outcome`` in an aligned row: no distribution (unpaired, masked, or no next token to train on);
transported; all mass on the gold next token (``inexact = "gold"``); copied, since both tokenizers are the same; inside a
source token, transported from what is left of the source's candidates after the bytes read (``inexact = "condition"``)."""


def aligned_schema(vocab_size: int, tail: Tail, *, has_draws: bool = False) -> pa.Schema:
    """Return the schema of ``align/<source>``: one row per train segment of N *target* positions.

    ``align`` writes it; ``fuse`` reads it.

    - ``source_position`` (N): the source position whose distribution was taken, -1 where none.
    - ``pair_start``, ``pair_end`` (N): the source positions paired with the target position, half-open; -1, -1 if none.
    - ``exact_context`` (N): both distributions condition on the same text. False inside a source token, where
      ``source_position`` is the token's first boundary, also where the outcome ``condition`` conditioned on the rest.
    - ``outcome`` (N): index into ``PAIRED_BY``.
    - ``topk_ids``, ``topk_logprobs`` (N, 0..k): the projected distribution over the target's vocabulary, natural logs,
      descending; empty where there is none. With ``tail = "renormalise"`` the probabilities of a row sum to 1.
      With draws in the source's logits (k + m entries then) this is a sample: its expectation is what the source's full
      distribution would give.
    - ``tail_mass`` (N), only with ``tail = "bucket"``: what the row's probabilities lack of 1, rounded to float16's
      precision as the logprobs are.
    - ``completed_logprob`` (N), only with ``has_draws``: ln of the probability of the gold next token, completed as
      ``stages.measures.teacher`` does, in the row that only the source's exact entries would have given. Rows are judged by
      it, because draws make the probability of a token noisy, and its logarithm is then biased. Null where the exact entries
      give no distribution, and at the last position. Not rounded, so that what is fitted to it (``fuse.function = "fitted"``)
      is the same with and without draws.
    """
    return pa.schema(
        [
            *_KEYS,
            pa.field("source_position", pa.list_(pa.int32()), nullable=False),
            pa.field("pair_start", pa.list_(pa.int32()), nullable=False),
            pa.field("pair_end", pa.list_(pa.int32()), nullable=False),
            pa.field("exact_context", pa.list_(pa.bool_()), nullable=False),
            pa.field("outcome", pa.list_(pa.uint8()), nullable=False),
            *_sparse(vocab_size),
            *_tail_field(tail),
            *([pa.field("completed_logprob", pa.list_(pa.float32()), nullable=False)] if has_draws else []),
        ],
        metadata={"tail": tail, "outcomes": ",".join(PAIRED_BY)},
    )


def fused_schema(vocab_size: int, tail: Tail, candidates: tuple[str, ...], *, conversations: bool = False) -> pa.Schema:
    """Return the schema of ``fuse``: one row per training block of N <= max_length target tokens.

    ``fuse`` writes it; ``train`` reads it.

    - ``block``: index of the block in its shard.
    - ``token_ids`` (N): the target's tokens, segments end to end.
    - ``piece_start`` (P): where the block's pieces of segments begin in the block; the first is 0.
    - ``piece_doc_id``, ``piece_segment`` (P): the segment each piece belongs to.
    - ``piece_offset`` (P): the piece's first token in its segment; above 0 for a segment cut by the block's border.
    - ``chosen`` (N): index of the candidate with the largest weight, -1 where there is no fused distribution; the
      candidates' names, the target model's first, are in the schema's metadata.
    - ``topk_ids``, ``topk_logprobs`` (N, 0..k), ``tail_mass`` (N): the fused distribution, as in ``aligned_schema``.
    - ``is_trained`` (N), only with ``conversations``: as in ``logits_schema``. Position t has a label if and only if the token
      after it in its piece is trained on.
    """
    return pa.schema(
        [
            pa.field("block", pa.int32(), nullable=False),
            pa.field("token_ids", pa.list_(id_type(vocab_size)), nullable=False),
            pa.field("piece_start", pa.list_(pa.int32()), nullable=False),
            pa.field("piece_doc_id", pa.list_(pa.int64()), nullable=False),
            pa.field("piece_segment", pa.list_(pa.int32()), nullable=False),
            pa.field("piece_offset", pa.list_(pa.int32()), nullable=False),
            pa.field("chosen", pa.list_(pa.int8()), nullable=False),
            *_sparse(vocab_size),
            *_tail_field(tail),
            *([_IS_TRAINED] if conversations else []),
        ],
        metadata={"tail": tail, "candidates": ",".join(candidates)},
    )


def _tail_field(tail: Tail) -> list[pa.Field]:
    return [pa.field("tail_mass", pa.list_(pa.float32()), nullable=False)] if tail == "bucket" else []


def tail_of(schema: pa.Schema) -> Tail:
    """Return the kind of tail of an aligned or a fused table."""
    return "bucket" if "tail_mass" in schema.names else "renormalise"


CODES: Final = (pa.int8(), pa.uint8())
"""Types of columns that hold one of a few values."""
LEVEL: Final = 12
LOGITS_LEVEL: Final = 17
LOGITS_FLOAT_LEVEL: Final = 19
"""zstd levels. Top-k lists are alike in ways that only zstd's slow searches find. Logits are the largest files and take the
longest to compute, so they are searched through: 27.4 bytes per token at k = 10 for 8 us of CPU, against 29.3 for 1.4 us at
level 12. The stages after them write as fast as they compute. No reader is slower for a high level."""


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """Return the options to write a table of this schema: zstd over the encoding that suits each column.

    - numbers of 32 bits and more: byte-stream-split. Floats hold values rounded to 16 bits, so two of their four streams
      are nearly empty; the high bytes of ids and positions compress. A dictionary would pack its indices at odd widths,
      which zstd cannot see through. Sixteen draws of a position, though they ascend, take 25.4 bytes in this way, 29.9 as
      deltas and 31.7 as they are.
    - ``byte_end``, which never decreases: deltas.
    - strings and codes of a few values: dictionaries.

    DuckDB, pandas, polars and datasets read all of them.
    """
    dictionary: list[str] = []
    encodings: dict[str, str] = {}
    levels: dict[str, int] = {}
    is_logits = "gold_logprob" in schema.names
    for field in schema:
        path, kind = field.name, field.type
        while pa.types.is_list(kind):
            path, kind = f"{path}.list.element", kind.value_type
        levels[path] = LEVEL if not is_logits else LOGITS_FLOAT_LEVEL if pa.types.is_floating(kind) else LOGITS_LEVEL
        if field.name == "byte_end":
            encodings[path] = "DELTA_BINARY_PACKED"
        elif pa.types.is_string(kind) or kind in CODES:
            dictionary.append(path)
        elif not pa.types.is_boolean(kind):
            encodings[path] = "BYTE_STREAM_SPLIT"
    return {
        "compression": "zstd",
        "compression_level": levels,
        "use_dictionary": dictionary or False,
        "column_encoding": encodings,
    }
