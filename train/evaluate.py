"""Bits per byte of a model on held-out text, comparable between tokenizers."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stages.contract.devices import attention_choices, resolve_device, set_threads
from stages.contract.entropy import CrossEntropy, cross_entropy
from stages.contract.heads import Body, Head, check_head, split_head
from stages.contract.models import ModelConfig, load_model, num_positions
from stages.contract.tokens import Encoding, SegmentTokenizer
from train.config import EvalConfig


@dataclass(frozen=True)
class Segment:
    """A piece of a held-out document, as the shard stage cut it.

    Attributes:
        doc_id: the document's index in the dataset.
        text: the segment's text.
        is_last: the document ends here.
    """

    doc_id: int
    text: str
    is_last: bool


@dataclass(frozen=True)
class Evaluation:
    """How well a model knows some texts.

    Attributes:
        total: over all documents.
        documents: (doc_id, its cross-entropy), in the order of the segments: for paired comparisons of models.
    """

    total: CrossEntropy
    documents: tuple[tuple[int, CrossEntropy], ...]

    @property
    def bits_per_byte(self) -> float:
        """Of all documents together."""
        return self.total.bits_per_byte


@dataclass(frozen=True)
class _Window:
    """A model input and where its predictions go.

    Attributes:
        segment: index of the segment.
        ids: (n,) what the model sees.
        scored: positions of ``ids`` whose next token is scored, half-open, at the window's end.
        at: where in the segment the first scored position lies.
    """

    segment: int
    ids: np.ndarray
    scored: tuple[int, int]
    at: int


def bits_per_byte(
    model: ModelConfig, segments: Sequence[Segment], config: EvalConfig, *, cpus: float = 1
) -> Evaluation:
    """Evaluate a model: a configured one, or an exported folder as ``ModelConfig(name=..., path=folder)``.

    Each segment is read on its own, with BOS if the model uses it. Probabilities are normalised over the tokenizer's ids.
    Special tokens are left out, and so is a first token that nothing predicts, with its bytes (see ``cross_entropy``).

    Args:
        model: which model.
        segments: held-out text; a document's segments stand together.
        config: precision, batches, and how many documents.
        cpus: threads on a CPU.

    Raises:
        ValueError: there is no text to score.
        FloatingPointError: a logprob is not finite; names the document.
    """
    segments = first_documents(segments, config.max_documents)
    if not segments:
        raise ValueError(
            "there is no held-out text: the shard stage's validation_fraction left no document to validation"
        )
    device = resolve_device(config.device)
    set_threads(device, cpus)
    tokenizer = SegmentTokenizer.load(model)
    encodings = tokenizer.encode_batch([part.text for part in segments], is_last=[part.is_last for part in segments])
    attention = attention_choices(config.attention, device, half_precision=config.dtype == "bfloat16")
    loaded = load_model(model, dtype=config.dtype, attention=attention, device=str(device))
    check_head(loaded)
    logprobs = gold_logprobs(
        loaded, encodings, config, num_ids=tokenizer.vocabulary.size, num_repeated=int(tokenizer.prepends_bos)
    )
    totals: dict[int, CrossEntropy] = {}
    for segment, encoding, gold in zip(segments, encodings, logprobs, strict=True):
        if not np.isfinite(gold[:-1]).all():
            raise FloatingPointError(f"model {model.name}: a logprob of document {segment.doc_id} is not finite")
        part = cross_entropy(gold, encoding.byte_end, tokenizer.vocabulary.is_special[encoding.ids])
        totals[segment.doc_id] = totals.get(segment.doc_id, CrossEntropy(0.0, 0, 0)) + part
    return Evaluation(sum(totals.values(), CrossEntropy(0.0, 0, 0)), tuple(totals.items()))


def first_documents(segments: Sequence[Segment], max_documents: int | None) -> list[Segment]:
    """The segments of the first ``max_documents`` documents, in their order; all when it is None."""
    kept = list(dict.fromkeys(part.doc_id for part in segments))[:max_documents]
    wanted = set(kept)
    return [part for part in segments if part.doc_id in wanted]


@torch.inference_mode()
def gold_logprobs(
    model: Any, encodings: Sequence[Encoding], config: EvalConfig, *, num_ids: int, num_repeated: int
) -> list[np.ndarray]:
    """The ln p(token t+1 | tokens <= t) of each segment, (N,) float32, NaN at its last position.

    Args:
        model: a transformers causal language model.
        encodings: the segments.
        config: a segment longer than ``max_length`` (or than the model's positions) is read in windows that overlap by
            half.
        num_ids: the tokenizer's size; embedding rows above it stand for no token and get no probability.
        num_repeated: first tokens (BOS) that stand before every window.
    """
    halves: tuple[Body, Head] = split_head(model)
    body, head = halves
    device = model.get_input_embeddings().weight.device
    max_length = num_positions(model, config.max_length)
    found = [np.full(len(encoding.ids), np.nan, np.float32) for encoding in encodings]
    windows = [
        window
        for index, encoding in enumerate(encodings)
        for window in _windows(index, encoding.ids, max_length=max_length, num_repeated=num_repeated)
    ]
    for batch in _batches(windows, config.batch_tokens):
        ids = np.zeros((len(batch), max(len(window.ids) for window in batch)), np.int64)
        scored = np.zeros(ids.shape, np.bool_)
        for row, window in enumerate(batch):  # padded on the right: a causal model's states do not depend on it
            ids[row, : len(window.ids)] = window.ids
            scored[row, slice(*window.scored)] = True
        gold = torch.from_numpy(np.roll(ids, -1, axis=1)[scored]).to(device)
        hidden = body(torch.from_numpy(ids).to(device))[torch.from_numpy(scored).to(device)]
        chunks = zip(hidden.split(config.chunk_positions), gold.split(config.chunk_positions), strict=True)
        flat = torch.cat([_gold(head(states), ids_, num_ids) for states, ids_ in chunks]).cpu().numpy()
        ends = np.cumsum(scored.sum(axis=1))
        for window, values in zip(batch, np.split(flat, ends[:-1]), strict=True):
            found[window.segment][window.at : window.at + len(values)] = values
    return found


def _gold(logits: torch.Tensor, gold: torch.Tensor, num_ids: int) -> torch.Tensor:
    logits = logits[:, :num_ids].float()
    return logits.gather(1, gold[:, None]).squeeze(1) - logits.logsumexp(dim=1)


def _windows(segment: int, ids: np.ndarray, *, max_length: int, num_repeated: int) -> Iterator[_Window]:
    """One window if the segment fits, else windows that overlap by half; each position is scored once."""
    if len(ids) < 2:
        return
    if len(ids) <= max_length:
        yield _Window(segment, ids, (0, len(ids) - 1), 0)
        return
    prefix, rest = ids[:num_repeated], ids[num_repeated:]
    room = max_length - num_repeated
    stride = math.ceil(room / 2)
    done = 0  # positions of the segment whose next token is scored
    for start in range(0, len(rest), stride):
        part = rest[start : start + room]
        first = done - start if start else 0
        last = len(prefix) + len(part) - 1
        yield _Window(segment, np.concatenate([prefix, part]), (first, last), done)
        done += last - first
        if start + room >= len(rest):
            return


def _batches(windows: Sequence[_Window], batch_tokens: int) -> Iterator[list[_Window]]:
    """Windows of similar length together, longest first; at most ``batch_tokens`` with padding, or one window."""
    batch: list[_Window] = []
    for window in sorted(windows, key=lambda window: -len(window.ids)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch
