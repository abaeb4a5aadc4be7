"""Bits per byte of a model on held-out text, comparable between tokenizers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stages.measures.cross_entropy import CrossEntropy, cross_entropy
from stages.models.batches import NO_GOLD, padded_batch, token_batches
from stages.models.config import ModelConfig, load_model, num_positions
from stages.models.devices import attention_choices, resolve_device, set_threads
from stages.models.heads import Body, Head, check_head, split_head
from stages.models.segment_text import Message, SegmentText
from stages.models.tokenizer import Encoding, SegmentTokenizer
from stages.models.windows import context_windows
from train.config import EvalConfig
from train.generate import Answer, answer_prompts, prompt_of

Scorer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Function from a model's logits (P, V) float32, the gold next tokens (P,) and the positions' places (P,), counted over all
segments end to end, to ln p(gold token) (P,)."""


@dataclass(frozen=True)
class Segment:
    """Piece of a document, as the shard stage cut it, or cut in the same way.

    Attributes:
        doc_id: the document's index in the dataset.
        text: the segment's text.
        is_last: the document ends here.
        first_byte: tokens that begin before it are not scored, so that all models are on the same bytes.
        messages: messages of a conversation; none for plain text.
    """

    doc_id: int
    text: str
    is_last: bool
    first_byte: int = 0
    messages: tuple[Message, ...] = ()

    @property
    def segment_text(self) -> SegmentText:
        """The segment as tokenizers receive it."""
        return SegmentText(self.text, self.is_last, self.messages)


@dataclass(frozen=True)
class Evaluation:
    """Cross-entropy of a model on some texts.

    Attributes:
        total: over all documents.
        documents: (doc_id, its cross-entropy), in the order of the segments: for paired comparisons of models.
        answers: the model's answers to held-out prompts; None if it was not asked.
    """

    total: CrossEntropy
    documents: tuple[tuple[int, CrossEntropy], ...]
    answers: tuple[Answer, ...] | None = None

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte over all documents."""
        return self.total.bits_per_byte


def own_logprob(logits: torch.Tensor, gold: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the model's own ln p of the gold tokens; the ``Scorer`` of every evaluation except a mixture's."""
    del places
    return logits.gather(1, gold[:, None]).squeeze(1) - logits.logsumexp(dim=1)


def bits_per_byte(
    model: ModelConfig,
    segments: Sequence[Segment],
    config: EvalConfig,
    *,
    cpus: float = 1,
    score: Scorer = own_logprob,
) -> Evaluation:
    """Evaluate a model: a configured one, or an exported folder as ``ModelConfig(name=..., path=folder)``.

    Each segment is read on its own, with BOS if the model uses it, a conversation under the model's chat template.
    Probabilities are normalised over the tokenizer's ids. Special tokens are left out, and so is a first token that nothing
    predicts, with its bytes (see ``cross_entropy``). Of conversations, the messages that are trained on are scored (see
    ``content_cross_entropy``).
    With ``config.num_generations`` the model is asked for answers as well, if it scores by itself.

    Args:
        model: which model.
        segments: held-out text; a document's segments stand together.
        config: precision, batches, and how many documents.
        cpus: threads on a CPU.
        score: function that returns the probability of the gold token.

    Raises:
        ValueError: there is no text to score.
        FloatingPointError: a logprob is not finite; names the document.
    """
    segments = first_documents(segments, config.max_documents)
    if not segments:
        raise ValueError(
            "there is no held-out text: with the shard stage's validation_fraction, no document was held out"
        )
    device = resolve_device(config.device)
    set_threads(device, cpus)
    tokenizer = SegmentTokenizer.load(model)
    encodings = tokenizer.encode_segments([segment.segment_text for segment in segments])
    attention = attention_choices(config.attention, device, half_precision=config.dtype == "bfloat16")
    loaded = load_model(model, dtype=config.dtype, attention=attention, device=str(device))
    check_head(loaded)
    _refuse_tokens_without_rows(model, loaded, segments, encodings)
    logprobs = gold_logprobs(
        loaded,
        encodings,
        config,
        num_ids=tokenizer.vocabulary.size,
        num_repeated=tokenizer.num_prefix,
        score=score,
    )
    totals: dict[int, CrossEntropy] = {}
    for segment, encoding, gold in zip(segments, encodings, logprobs, strict=True):
        if not np.isfinite(gold[:-1]).all():
            raise FloatingPointError(f"model {model.name}: a logprob of document {segment.doc_id} is not finite")
        if segment.messages:
            segment_loss = content_cross_entropy(gold, segment.messages, encoding)
        else:
            is_special = tokenizer.vocabulary.is_special[encoding.ids]
            segment_loss = cross_entropy(gold, encoding.byte_end, is_special, first_byte=segment.first_byte)
        totals[segment.doc_id] = totals.get(segment.doc_id, CrossEntropy(0.0, 0, 0)) + segment_loss
    answers = None
    if config.num_generations and score is own_logprob:
        prompts = last_prompts(segments, encodings, config.num_generations)
        answers = tuple(answer_prompts(loaded, tokenizer, prompts, config))
    return Evaluation(sum(totals.values(), CrossEntropy(0.0, 0, 0)), tuple(totals.items()), answers)


def content_cross_entropy(gold_logprob: np.ndarray, messages: Sequence[Message], encoding: Encoding) -> CrossEntropy:
    """Compute the cross-entropy of a conversation: of the contents that are trained on and of the ends of their turns.

    Other tokens of the template are left out, so that models with other templates compare. The end of a turn counts with its
    loss, since a model is to know when to stop, and without bytes. The bytes are those of the messages, whether a template
    trims them or not: every model's figure is of the same bytes.

    Args:
        gold_logprob: (N,) ln p(token t+1 | tokens <= t); NaN at the last position.
        messages: messages of the conversation.
        encoding: its N tokens, with roles.
    """
    assert encoding.is_trained is not None  # it is a conversation's
    counted = encoding.is_trained[1:]
    return CrossEntropy(
        nats=float(-gold_logprob[:-1][counted].sum(dtype=np.float64)),
        num_tokens=int(counted.sum()),
        num_bytes=sum(len(message.content.encode()) for message in messages if message.is_trained),
    )


def last_prompts(
    segments: Sequence[Segment], encodings: Sequence[Encoding], num_prompts: int
) -> list[tuple[int, np.ndarray]]:
    """Return the prompts of the first conversations that have an answer to give: (document, token ids) each."""
    prompts: dict[int, np.ndarray] = {}
    for segment, encoding in zip(segments, encodings, strict=True):
        if segment.doc_id in prompts or len(prompts) == num_prompts:
            continue
        prompt = prompt_of(segment.segment_text, encoding)
        if prompt is not None:
            prompts[segment.doc_id] = prompt
    return list(prompts.items())


def _refuse_tokens_without_rows(
    model: ModelConfig, loaded: Any, segments: Sequence[Segment], encodings: Sequence[Encoding]
) -> None:
    """Refuse a text with a token that the embedding has no row for.

    Raises:
        ValueError: names the document.
    """
    num_rows = int(loaded.get_input_embeddings().weight.shape[0])
    for segment, encoding in zip(segments, encodings, strict=True):
        largest = int(encoding.ids.max(initial=-1))
        if largest >= num_rows:
            raise ValueError(
                f"model {model.name}: document {segment.doc_id} holds token {largest}, and the model's embedding has "
                f"{num_rows} rows: do tokenizer and weights belong together?"
            )


def first_documents(segments: Sequence[Segment], max_documents: int | None) -> list[Segment]:
    """Return the segments of the first ``max_documents`` documents, in their order; all segments if it is None."""
    kept = list(dict.fromkeys(segment.doc_id for segment in segments))[:max_documents]
    wanted = set(kept)
    return [segment for segment in segments if segment.doc_id in wanted]


@torch.inference_mode()
def gold_logprobs(
    model: Any,
    encodings: Sequence[Encoding],
    config: EvalConfig,
    *,
    num_ids: int,
    num_repeated: int,
    score: Scorer = own_logprob,
) -> list[np.ndarray]:
    """Compute ln p(token t+1 | tokens <= t) of each segment, (N,) float32, NaN at its last position.

    Args:
        model: a transformers causal language model.
        encodings: the segments.
        config: a segment longer than ``max_length`` (or than the model's positions) is read in windows that overlap by
            half.
        num_ids: the tokenizer's size; embedding rows above it stand for no token and get no probability.
        num_repeated: first tokens (BOS) that stand before every window.
        score: function that returns the probability of the gold token.
    """
    max_length = num_positions(model, config.max_length)
    halves: tuple[Body, Head] = split_head(model)
    body, head = halves
    device = model.get_input_embeddings().weight.device
    sequences = [encoding.ids for encoding in encodings]
    starts = np.append(0, np.cumsum([len(ids) for ids in sequences], dtype=np.int64))
    logprobs = np.full(starts[-1], np.nan, np.float32)
    inputs = [
        (index, window)
        for index, ids in enumerate(sequences)
        for window in (context_windows(len(ids), max_length=max_length, num_prefix=num_repeated) if len(ids) else ())
    ]
    for indices in token_batches([len(window) for _, window in inputs], max_tokens=config.batch_tokens):
        batch = padded_batch([inputs[index] for index in indices], sequences, starts)
        hidden = body(
            torch.from_numpy(batch.input_ids).to(device), attention_mask=torch.from_numpy(batch.mask).to(device)
        )
        wanted = batch.gold_ids != NO_GOLD
        states = hidden[torch.from_numpy(batch.taken).to(device)][torch.from_numpy(wanted).to(device)]
        gold = torch.from_numpy(batch.gold_ids[wanted]).to(device)
        places = torch.from_numpy(batch.rows[wanted]).to(device)
        chunks = zip(*(array.split(config.chunk_positions) for array in (states, gold, places)), strict=True)
        scores = [score(head(chunk)[:, :num_ids].float(), ids, where) for chunk, ids, where in chunks]
        logprobs[batch.rows[wanted]] = torch.cat(scores).cpu().numpy()
    return np.split(logprobs, starts[1:-1])
