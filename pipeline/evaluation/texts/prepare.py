"""Prepare the texts of a run: choose their documents, leave out those that training has read, cut them into segments.

What a text shares with the training documents is kept under ``texts/<name>/<fingerprint>/overlap.json``: the training shards
are read once for all texts that are new.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import pyarrow.compute as pc

from pipeline.dataset.documents import plan_documents, read_documents, read_kinds
from pipeline.dataset.files import reading
from pipeline.evaluation.texts.choose import NO_KIND, choose_documents, shorten
from pipeline.evaluation.texts.describe import describe_counts
from pipeline.evaluation.texts.overlap import Overlap, OverlapIndex
from pipeline.run.session import Run, StageError
from pipeline.run.stage_table import eval_key
from pipeline.settings.texts import TEXT_VERSION, TextConfig
from stages.contract.fingerprint import fingerprint
from stages.contract.manifest import stage_folder
from stages.measures.cross_entropy import first_common_byte
from stages.models.segment_text import Message, SegmentText, segment_texts
from stages.models.tokenizer import SegmentTokenizer
from stages.shard.conversations import ConversationError, cut_conversations, read_conversation
from stages.shard.cut import CutError, cut_document
from train.evaluate import Segment

DOCUMENTS_AT_A_TIME: Final = 4000
"""Documents of a corpus that are held at once while some are chosen."""
_NAMED_DOCUMENTS: Final = 5


@dataclass(frozen=True)
class PreparedText:
    """A text as the models of a run are evaluated on it.

    Attributes:
        segments: segments of the documents that are scored; a document's segments stand together.
        kinds: number of a scored document -> its kind; empty without ``kind_column``.
        counts: documents of the corpus and their outcomes (``describe_counts``).
    """

    segments: tuple[Segment, ...]
    kinds: Mapping[int, str]
    counts: Mapping[str, int]


@dataclass(frozen=True)
class _Document:
    """A chosen document; ``whole`` is None and ``reason`` says why where it cannot be read.

    Of a conversation ``whole`` is what is looked for in the training documents, see ``_spoken``.
    """

    doc_id: int
    kind: str | None
    whole: str | None
    reason: str | None = None
    messages: tuple[Message, ...] = ()


def prepare_texts(run: Run, names: Sequence[str], num_shards: int) -> dict[str, PreparedText]:
    """Prepare some of a run's texts.

    Args:
        run: the run; its shard stage is complete.
        names: names of the texts.
        num_shards: number of shards of the shard stage.

    Raises:
        StageError: no document of a text is left, or one shares text with the training documents and ``overlap`` says
            ``refuse``.
        FileNotFoundError, DatasetError: a text's files cannot be read.
    """
    if not names:
        return {}
    texts = {name: run.config.eval.find_text(name) for name in names}
    known = {name: _read_overlaps(run, text) for name, text in texts.items()}
    documents: dict[str, list[_Document]] = {}
    totals: dict[str, dict[str, int]] = {}
    for name, text in texts.items():
        documents[name], totals[name] = reading(text, _read_chosen, text)
    new = [name for name in names if known[name] is None]
    known |= _measure_overlaps(run, {name: texts[name] for name in new}, documents, num_shards)
    tokenizers = {model.name: SegmentTokenizer.load(model) for model in run.config.models}
    prepared = {}
    for name, text in texts.items():
        kept, counts = _keep(text, documents[name], known[name] or {})
        cut = _cut_conversations if text.has_conversations else _segments
        segments, uncut = cut(text, kept, tokenizers, run.config.shard.max_length)
        scored = {segment.doc_id for segment in segments}
        kinds = {
            document.doc_id: document.kind
            for document in kept
            if document.kind is not None and document.doc_id in scored
        }
        counts |= {"uncut": len(uncut), "scored": len(scored), "scored_kinds": len(set(kinds.values())), **totals[name]}
        if not segments:
            unreadable = {
                document.doc_id: document.reason for document in documents[name] if document.reason is not None
            }
            reasons = unreadable | uncut
            first = min(reasons, default=None)
            example = "" if first is None else f". Document {first}: {reasons[first]}"
            raise StageError(
                f"{text.section}: no documents are left to score: {describe_counts(counts)}{example}. Use a different or "
                "longer text, or raise max_overlap there"
            )
        prepared[name] = PreparedText(tuple(segments), kinds, counts)
    return prepared


# --- documents --------------------------------------------------------------------------------------------------------


def _read_chosen(text: TextConfig) -> tuple[list[_Document], dict[str, int]]:
    """Read the chosen documents of a corpus, and count all its documents and kinds."""
    ranges = plan_documents(text, DOCUMENTS_AT_A_TIME)
    total = sum(shard.num_documents for shard in ranges)
    kinds = [NO_KIND] * total
    if text.kind_column is not None:
        for shard in ranges:
            for number, kind in read_kinds(text, shard).items():
                kinds[number] = NO_KIND if kind is None else kind
    chosen = set(choose_documents(kinds, num_documents=text.num_documents, fraction=text.fraction))
    documents = []
    for shard in ranges:
        if chosen.isdisjoint(range(shard.first_doc_id, shard.first_doc_id + shard.num_documents)):
            continue
        for row in read_documents(text, shard).to_pylist():
            if row["doc_id"] in chosen:
                kind = None if text.kind_column is None else kinds[row["doc_id"]]
                documents.append(_decoded(row, kind, text))
    return documents, {"documents": total, "kinds": 0 if text.kind_column is None else len(set(kinds))}


def _decoded(row: Mapping[str, Any], kind: str | None, text: TextConfig) -> _Document:
    raw = row["text"]
    if raw is None:
        column = "messages" if text.has_conversations else "text"
        return _Document(row["doc_id"], kind, None, row["error"] or f"the {column} column is null in this record")
    if text.has_conversations:
        return _decoded_conversation(row["doc_id"], raw, kind, text)
    try:
        whole = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return _Document(row["doc_id"], kind, None, f"not UTF-8 at byte {error.start}")
    if not shorten(whole, text.max_characters).strip():
        where = "" if text.max_characters is None else f" in its first {text.max_characters} characters"
        return _Document(row["doc_id"], kind, None, f"empty, or only whitespace{where}")
    return _Document(row["doc_id"], kind, whole)


def _decoded_conversation(doc_id: int, raw: bytes, kind: str | None, text: TextConfig) -> _Document:
    try:
        messages = read_conversation(raw, text.train_on)
    except ConversationError as error:
        return _Document(doc_id, kind, None, str(error))
    if not any(message.is_trained and message.content.strip() for message in messages):
        return _Document(doc_id, kind, None, "no message to score, or only whitespace")
    return _Document(doc_id, kind, _spoken(messages), messages=messages)


def _spoken(messages: Sequence[Message]) -> str:
    """Return what user and assistant say. Many conversations begin with the same system message, which is no overlap."""
    return "\n".join(message.content for message in messages if message.role != "system")


def _scored(text: TextConfig, document: _Document) -> str:
    """Return the scored part of a readable document."""
    assert document.whole is not None
    return shorten(document.whole, text.max_characters)


# --- overlap ----------------------------------------------------------------------------------------------------------


def _overlap_key(run: Run, text: TextConfig) -> str:
    """Return the key of a text's overlap with the training documents; it does not depend on the limit."""
    step = run.resolved.steps[eval_key(run.config.target.name, text.name)]
    settings = {key: value for key, value in step.settings["text"].items() if key not in ("overlap", "max_overlap")}
    inputs = {name: step.settings["inputs"][name] for name in ("documents", "shard")}
    return f"{stage_folder(f'texts/{text.name}', fingerprint('text', TEXT_VERSION, settings, inputs))}/overlap.json"


def _read_overlaps(run: Run, text: TextConfig) -> dict[int, Overlap] | None:
    try:
        value = json.loads(run.store.read(_overlap_key(run, text)))
    except FileNotFoundError:
        return None
    return {document["doc_id"]: Overlap(document["is_equal"], document["share"]) for document in value["documents"]}


def _measure_overlaps(
    run: Run, texts: Mapping[str, TextConfig], documents: Mapping[str, Sequence[_Document]], num_shards: int
) -> dict[str, dict[int, Overlap]]:
    """Read the training documents once for several texts, and record what each shares with them."""
    readable = [(name, document) for name in texts for document in documents[name] if document.whole is not None]
    if not readable:
        return {name: {} for name in texts}
    index = OverlapIndex(
        [_scored(texts[name], document) for name, document in readable],
        [str(document.whole) for _, document in readable],
    )
    for training in _training_documents(run, num_shards):
        index.read(training)
    overlaps: dict[str, dict[int, Overlap]] = {name: {} for name in texts}
    for (name, document), overlap in zip(readable, index.overlaps(), strict=True):
        overlaps[name][document.doc_id] = overlap
    for name, text in texts.items():
        records = [
            {"doc_id": document.doc_id, "kind": document.kind, **asdict(overlaps[name][document.doc_id])}
            for document in documents[name]
            if document.doc_id in overlaps[name]
        ]
        unreadable = [
            {"doc_id": document.doc_id, "reason": document.reason} for document in documents[name] if document.reason
        ]
        value = {"text": name, "documents": records, "unreadable": unreadable}
        run.store.create(_overlap_key(run, text), (json.dumps(value, indent=1) + "\n").encode())
    return overlaps


def _training_documents(run: Run, num_shards: int) -> Iterator[list[str]]:
    """Yield the training documents, shard by shard, each joined from its segments."""
    manifests = run.store.manifests(run.resolved.steps["shard"].folder)
    for shard in range(num_shards):
        table = run.store.read_table(manifests[shard].data, remake="`make shard`")
        rows = table.filter(pc.equal(table["split"], "train"))
        segments_by_document: dict[int, list[SegmentText]] = {}
        for doc_id, segment in zip(rows["doc_id"].to_pylist(), segment_texts(rows), strict=True):
            segments_by_document.setdefault(doc_id, []).append(segment)
        yield [_joined(segments) for segments in segments_by_document.values()]


def _joined(segments: Sequence[SegmentText]) -> str:
    """Return a training document as ``_Document.whole`` has one."""
    if segments[0].messages:
        return _spoken([message for segment in segments for message in segment.messages])
    return "".join(segment.text for segment in segments)


def _keep(
    text: TextConfig, documents: Sequence[_Document], overlaps: Mapping[int, Overlap]
) -> tuple[list[_Document], dict[str, int]]:
    """Leave out documents that cannot be scored.

    Raises:
        StageError: a document shares text with the training documents, and that is refused.
    """
    readable = [document for document in documents if document.whole is not None]
    shared = [
        document
        for document in readable
        if overlaps[document.doc_id].is_equal or overlaps[document.doc_id].share > text.max_overlap
    ]
    if shared and text.overlap == "refuse":
        named = ", ".join(
            f"document {document.doc_id} ({_describe(overlaps[document.doc_id])})"
            for document in shared[:_NAMED_DOCUMENTS]
        )
        more = f" and {len(shared) - _NAMED_DOCUMENTS} more" if len(shared) > _NAMED_DOCUMENTS else ""
        raise StageError(
            f"{text.section}: {len(shared)} of its {len(documents)} documents share more than max_overlap = "
            f"{text.max_overlap} of their 13-grams with the training documents, or are one of them: {named}{more}. Remove them "
            'from the text, or set overlap = "filter" there, then run the command again'
        )
    without = {document.doc_id for document in shared}
    kept = [document for document in readable if document.doc_id not in without]
    counts = {
        "chosen": len(documents),
        "unreadable": len(documents) - len(readable),
        "overlapping": len(shared),
    }
    return kept, counts


def _describe(overlap: Overlap) -> str:
    return "equal" if overlap.is_equal else f"{overlap.share:.0%}"


# --- segments ---------------------------------------------------------------------------------------------------------


def _segments(
    text: TextConfig, documents: Sequence[_Document], tokenizers: Mapping[str, SegmentTokenizer], max_length: int
) -> tuple[list[Segment], dict[int, str]]:
    """Cut documents as the shard stage does, so that they fit every tokenizer.

    Returns:
        The segments, each with the byte from which on all models predict; and of each document that has no cut why.
    """
    measures = [tokenizer.measure for tokenizer in tokenizers.values()]
    pieces: list[tuple[int, str, bool]] = []
    uncut: dict[int, str] = {}
    for document in documents:
        try:
            cut = cut_document(_scored(text, document), measures, max_length).segments
        except CutError as error:
            uncut[document.doc_id] = str(error)
            continue
        pieces.extend((document.doc_id, piece, index == len(cut) - 1) for index, piece in enumerate(cut))
    encodings = [
        tokenizer.encode_batch([piece for _, piece, _ in pieces], is_last=[last for _, _, last in pieces])
        for tokenizer in tokenizers.values()
    ]
    ends = [[encoding.byte_end for encoding in of_segment] for of_segment in zip(*encodings, strict=True)]
    return [
        Segment(doc_id, piece, last, first_byte=first_common_byte(byte_ends))
        for (doc_id, piece, last), byte_ends in zip(pieces, ends, strict=True)
    ], uncut


def _cut_conversations(
    text: TextConfig, documents: Sequence[_Document], tokenizers: Mapping[str, SegmentTokenizer], max_length: int
) -> tuple[list[Segment], dict[int, str]]:
    """Cut conversations as the shard stage does; see ``_segments``. Every model predicts all that is scored of them."""
    del text  # a conversation is scored whole
    messages = [document.messages for document in documents]
    cut = cut_conversations(messages, tuple(tokenizers.values()), max_length, tuple(tokenizers))
    segments: list[Segment] = []
    uncut: dict[int, str] = {}
    for document, pieces in zip(documents, cut, strict=True):
        if isinstance(pieces, ConversationError):
            uncut[document.doc_id] = str(pieces)
            continue
        segments += [
            Segment(document.doc_id, piece.text.text, piece.text.is_last, messages=piece.text.messages)
            for piece in pieces
        ]
    return segments, uncut
