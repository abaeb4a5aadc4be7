"""Token-level ensemble: the target's distribution mixed with the sources' aligned ones, without training.

At every position the target's own distribution p and the sources' aligned distributions q_s are added up by weight,

    p_ens = (1 - sum_s w_s) p + sum_s w_s q_s,

where a row's tail mass is divided among the tokens that it does not list, in the target's proportions; a source without
a distribution has the target's own in its place. So p_ens sums to 1 over the target's vocabulary, and its bits per byte are
a code length. docs/baselines.md says what a source may know at a position. Of a conversation it knows the messages so far,
under its own chat template.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch

from pipeline.evaluation.contexts import (
    Contexts,
    conversation_contexts,
    message_contexts,
    prefix_contexts,
    segment_contexts,
)
from pipeline.settings.baselines import ENSEMBLE
from pipeline.settings.run import RunConfig
from stages.align.rows import ModelRows
from stages.align.segment import same_vocabulary
from stages.align.stage import AlignStage
from stages.align.vocabulary_maps import NO_ID
from stages.contract.roles import TokenRoles
from stages.logits.backends.base import NotFiniteError, Predictions
from stages.logits.backends.transformers import TransformersBackend
from stages.logits.config import LogitsConfig
from stages.models.config import ModelConfig
from stages.models.tokenizer import Encoding, SegmentTokenizer
from stages.models.windows import ContextWindow, context_windows
from train.evaluate import Evaluation, Segment, bits_per_byte, first_documents, own_logprob

TOKENS_AT_A_TIME: Final = 500_000
"""Tokens of contexts for which a source's predictions are held at once: 80 bytes each at k = 10."""


@dataclass(frozen=True, eq=False)
class SourceRows:
    """Distributions of one source over the target's vocabulary at P positions, all segments end to end.

    Attributes:
        ids: (P, k) int64, each once in a row; -1 at pads, a row of pads where there is no distribution.
        probs: (P, k) float64; 0 at pads.
        tail_mass: (P,) float64; with the row's probabilities it sums to 1.
    """

    ids: torch.Tensor
    probs: torch.Tensor
    tail_mass: torch.Tensor


class EnsembleScorer:
    """``train.evaluate.Scorer`` of the ensemble: ln p_ens of the gold tokens.

    Args:
        weights: weight of each source; the target has the rest of 1, which is above 0.
        sources: their distributions.
    """

    def __init__(self, weights: Sequence[float], sources: Sequence[SourceRows]) -> None:
        self._weights = tuple(weights)
        self._sources = tuple(sources)

    def __call__(self, logits: torch.Tensor, gold: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """See ``train.evaluate.Scorer``."""
        target_logprob = own_logprob(logits, gold, places).double()
        weighted = [target_logprob + np.log1p(-sum(self._weights))]
        for weight, source in zip(self._weights, self._sources, strict=True):
            if weight > 0:
                weighted.append(_source_logprob(source, logits, target_logprob, gold, places) + np.log(weight))
        return torch.stack(weighted).logsumexp(dim=0)


def _source_logprob(
    source: SourceRows,
    logits: torch.Tensor,
    target_logprob: torch.Tensor,
    gold: torch.Tensor,
    places: torch.Tensor,
) -> torch.Tensor:
    """Compute ln q_s(gold), (P,) float64; the target's own where the source has no distribution."""
    device = logits.device
    ids, probs, tail_mass = (array[places.cpu()].to(device) for array in (source.ids, source.probs, source.tail_mass))
    is_gold = ids == gold[:, None]
    named = torch.where(is_gold, probs, 0.0).sum(dim=1).log()
    present = ids[:, 0] != NO_ID
    filled = torch.where(ids == NO_ID, ids[:, :1], ids).clamp(min=0)  # a pad names its row's first token once more
    # Not by 1 - sum of p: where the row names nearly all of the target's mass, nothing would be left of the difference.
    unnamed = logits.scatter(1, filled, -torch.inf)
    in_tail = tail_mass.log() + own_logprob(unnamed, gold, places)
    in_tail = torch.where(is_gold.any(dim=1), -torch.inf, in_tail)
    return torch.where(present, torch.logaddexp(named, in_tail), target_logprob)


def evaluate_ensemble(
    config: RunConfig, segments: Sequence[Segment], *, cpus: float
) -> tuple[Evaluation, dict[str, Any]]:
    """Compute the bits per byte of the ensemble of a run's target, before training, and its sources.

    The target is run twice, for its top-k that alignment needs and for its full distributions; a source once. Held at
    once: one model, and 170 bytes per position and source (k = 10).

    Args:
        config: models, ``align`` (except for ``pairing`` and ``inexact``: contexts always agree here), ``eval``, ``baselines``.
        segments: held-out text; a document's segments stand together.
        cpus: threads on a CPU.

    Returns:
        The evaluation, and for each source how many positions with a next token it has a distribution at, and how many
        tokens it read for that.

    Raises:
        ValueError: a model's logprob is not finite.
    """
    segments = first_documents(segments, config.eval.max_documents)
    tokenizer = SegmentTokenizer.load(config.target)
    encodings = tokenizer.encode_segments([segment.segment_text for segment in segments])
    target_rows = _target_rows(config, tokenizer, encodings, cpus)
    rows, notes = [], {}
    for source in config.sources:
        reading = _SourceReader(config, source, cpus).read(segments, encodings, target_rows)
        rows.append(reading.rows)
        notes[source.name] = {"covered": reading.covered, "tokens_read": reading.num_tokens}
    weights = config.baselines.source_weights(ENSEMBLE, len(config.sources))
    evaluation = bits_per_byte(config.target, segments, config.eval, cpus=cpus, score=EnsembleScorer(weights, rows))
    positions = sum(int(rows.has_label.sum()) for rows in target_rows)
    return evaluation, {"positions": positions, "sources": notes}


@dataclass(frozen=True)
class _Read:
    """A source's distributions, at how many positions it has one, and how many tokens it read."""

    rows: SourceRows
    covered: int
    num_tokens: int


class _SourceReader:
    """Reader that runs one source over the held-out text and aligns its predictions."""

    def __init__(self, config: RunConfig, source: ModelConfig, cpus: float) -> None:
        self._config = config
        self._source = source
        self._tokenizer = SegmentTokenizer.load(source)
        self._backend = _backend(config, source, self._tokenizer, cpus)
        top_p = config.align.top_p or (config.logits.top_p if config.logits.top_p < 1 else None)
        settings = {"pairing": "boundary", "inexact": "mask", "top_p": top_p}
        self._align = AlignStage(config.align.model_copy(update=settings), config.target, source)
        self._align.setup()
        self._same_vocabulary = same_vocabulary(
            SegmentTokenizer.load(config.target).vocabulary, self._tokenizer.vocabulary
        )

    def read(
        self, segments: Sequence[Segment], encodings: Sequence[Encoding], target_rows: Sequence[ModelRows]
    ) -> _Read:
        """Read all segments, a group at a time."""
        rows: list[SourceRows] = []
        num_tokens = 0
        for group, contexts in self._groups(segments, encodings):
            sequences = [ids for of_segment in contexts for ids in of_segment.sequences]
            predictions = _predict(
                self._backend, self._source, sequences, self._cuts(contexts), self._tokenizer.num_prefix
            )
            num_tokens += int(predictions.starts[-1])
            first = 0
            for index, of_segment in zip(group, contexts, strict=True):
                source = _source_rows(
                    target_rows[index], of_segment, predictions, first, is_marked=self._tokenizer.has_dummy_prefix
                )
                aligned = self._align.align_rows(target_rows[index], source)
                tensors = (aligned.ids.astype(np.int64), aligned.probs, aligned.tail_mass)
                rows.append(SourceRows(*map(torch.from_numpy, tensors)))
                first += len(of_segment.sequences)
        names = ("ids", "probs", "tail_mass")
        joined = SourceRows(*(torch.cat([getattr(of_segment, name) for of_segment in rows]) for name in names))
        return _Read(joined, int((joined.ids[:, 0] != NO_ID).sum()), num_tokens)

    def _groups(
        self, segments: Sequence[Segment], encodings: Sequence[Encoding]
    ) -> Iterator[tuple[list[int], list[Contexts]]]:
        """Yield groups of segments whose contexts together have about ``TOKENS_AT_A_TIME`` tokens."""
        group: list[int] = []
        contexts: list[Contexts] = []
        for index, (segment, encoding) in enumerate(zip(segments, encodings, strict=True)):
            group.append(index)
            contexts.append(self._contexts(segment, encoding))
            if sum(len(ids) for of_segment in contexts for ids in of_segment.sequences) >= TOKENS_AT_A_TIME:
                yield group, contexts
                group, contexts = [], []
        if group:
            yield group, contexts

    def _contexts(self, segment: Segment, encoding: Encoding) -> Contexts:
        if segment.messages:
            (whole,) = self._tokenizer.encode_segments([segment.segment_text])
            if self._config.baselines.ensemble_contexts == "segment" or self._reads_the_same(whole, encoding):
                return conversation_contexts(whole, encoding)
            return message_contexts(segment.segment_text, encoding, self._tokenizer)
        whole = self._tokenizer.encode(segment.text, is_last=False)
        if self._config.baselines.ensemble_contexts == "segment" or self._reads_the_same(whole, encoding):
            return segment_contexts(whole, encoding.byte_end)
        return prefix_contexts(segment.text, encoding.byte_end, self._tokenizer)

    def _reads_the_same(self, source: Encoding, target: Encoding) -> bool:
        """Return whether both models have the same tokens of the text, so that the source can read the target's."""
        if not self._same_vocabulary:
            return False
        is_special = self._tokenizer.vocabulary.is_special
        return np.array_equal(*(encoding.ids[~is_special[encoding.ids]] for encoding in (source, target)))

    def _cuts(self, contexts: Sequence[Contexts]) -> list[int]:
        """Return the first position of each sequence that is needed."""
        return [
            int(of_segment.position[of_segment.sequence == index].min())
            for of_segment in contexts
            for index in range(len(of_segment.sequences))
        ]


def _target_rows(
    config: RunConfig, tokenizer: SegmentTokenizer, encodings: Sequence[Encoding], cpus: float
) -> list[ModelRows]:
    """Compute the target's own top-k at every position of the segments."""
    backend = _backend(config, config.target, tokenizer, cpus)
    sequences = [encoding.ids for encoding in encodings]
    predictions = _predict(backend, config.target, sequences, [0] * len(sequences), tokenizer.num_prefix)
    return [
        ModelRows(
            token_ids=encoding.ids,
            byte_end=encoding.byte_end,
            topk_ids=predictions.topk_ids[predictions.positions_of(index)],
            topk_probs=np.exp(predictions.topk_logprobs[predictions.positions_of(index)].astype(np.float64)),
            roles=_token_roles(encoding),
        )
        for index, encoding in enumerate(encodings)
    ]


def _token_roles(encoding: Encoding) -> TokenRoles | None:
    """Return the roles of the tokens of a conversation; None for plain text."""
    if encoding.role is None or encoding.is_trained is None:
        return None
    return TokenRoles(encoding.role, encoding.is_trained)


def _source_rows(
    target: ModelRows, contexts: Contexts, predictions: Predictions, first: int, *, is_marked: bool
) -> ModelRows:
    """Lay out the source's rows as if its tokens ended where the target's do: one row per target position.

    Args:
        target: M positions.
        contexts: contexts of the segment.
        predictions: predictions of the sequences of several segments.
        first: the index of the segment's first sequence among them.
        is_marked: the source writes a message's first token with a space that the message does not have.
    """
    size, width = len(target), predictions.topk_ids.shape[1]
    ids = np.full((size, width), NO_ID, np.int32)
    probs = np.zeros((size, width))
    last_token = np.zeros(size, np.int32)
    read = np.flatnonzero(contexts.sequence >= 0)
    places = predictions.starts[first + contexts.sequence[read]] + contexts.position[read]
    ids[read], probs[read] = predictions.topk_ids[places], np.exp(predictions.topk_logprobs[places].astype(np.float64))
    for index in read:
        last_token[index] = contexts.sequences[contexts.sequence[index]][contexts.position[index]]
    return ModelRows(
        token_ids=last_token,
        byte_end=target.byte_end,
        topk_ids=ids,
        topk_probs=probs,
        roles=target.roles,
        is_marked=np.full(size, is_marked),  # these rows have no token of the source behind a message's start
    )


def _backend(config: RunConfig, model: ModelConfig, tokenizer: SegmentTokenizer, cpus: float) -> TransformersBackend:
    """Build the backend that runs a model as the evaluation does, with the window that the logits stage keeps."""
    settings = config.eval
    return TransformersBackend(
        LogitsConfig(
            top_k=config.logits.top_k,
            max_length=settings.max_length,
            backend="transformers",
            dtype=settings.dtype,
            attention=settings.attention,
            device=settings.device,
            batch_tokens=settings.batch_tokens,
            chunk_positions=settings.chunk_positions,
            cpus_per_worker=cpus,
        ),
        model,
        num_valid=tokenizer.vocabulary.size,
    )


def _predict(
    backend: TransformersBackend,
    model: ModelConfig,
    sequences: Sequence[np.ndarray],
    first_taken: Sequence[int],
    num_prefix: int,
) -> Predictions:
    """Run a model over sequences; positions before ``first_taken`` of a sequence are only context.

    Raises:
        ValueError: a logprob is not finite.
    """
    cuts = [
        _cut(len(ids), first, max_length=backend.max_length, num_prefix=num_prefix)
        for ids, first in zip(sequences, first_taken, strict=True)
    ]
    try:
        return backend.predict(sequences, cuts)
    except NotFiniteError as error:
        raise ValueError(
            f"eval/{ENSEMBLE}: model {model.name}: {error} of the held-out text: its weights hold NaN, or eval.dtype "
            "overflows: try --set eval.dtype=float32, or turn off baselines.ensemble"
        ) from error


def _cut(length: int, first: int, *, max_length: int, num_prefix: int) -> list[ContextWindow]:
    if not length:
        return []
    cut = context_windows(length, max_length=max_length, num_prefix=num_prefix)
    return [replace(window, take_start=max(first, window.take_start)) for window in cut if window.end > first]
