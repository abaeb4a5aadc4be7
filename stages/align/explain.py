"""Explanation of one aligned position, as text for people: ``ptafuse inspect``."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from stages.align.config import AlignConfig
from stages.align.rows import ModelRows, Side, narrow
from stages.align.segment import AlignedSegment
from stages.align.vocabulary_maps import NO_ID
from stages.models.vocabulary import Vocabulary

CONTEXT_TOKENS: Final = 4
"""Target tokens shown on each side of the position."""


@dataclass(frozen=True)
class TokenProb:
    """A token with its probability (or prior)."""

    text: str
    prob: float


@dataclass(frozen=True)
class PairedToken:
    """A target token and the source tokens that it is paired with.

    Attributes:
        position: the target position.
        text: text of the target token.
        source_start: first paired source position; -1 where there is none.
        source_texts: texts of the paired source tokens.
        exact_context: the source position to take from ends at the same byte.
    """

    position: int
    text: str
    source_start: int
    source_texts: tuple[str, ...]
    exact_context: bool


@dataclass(frozen=True, eq=False)
class AlignmentExplanation:
    """Derivation of a target position's distribution; lists are empty where there was nothing to compute.

    Texts can be printed: bytes that are no UTF-8 are written in hexadecimal.

    Attributes:
        doc_id: the document.
        segment: the segment in its document.
        position: the target position in the segment; its distribution is over the next token.
        context: the target tokens around the position with their source tokens, in order.
        gold_next: the next target token, None at the last position.
        source_position: source position whose distribution was used; -1: none.
        exact_context: both distributions condition on the same text.
        outcome: ``"none"``, ``"transport"``, ``"gold"``, ``"identity"`` or ``"condition"``.
        seen: where the outcome is ``"condition"``, what was read of the source's token; what moves is what is left of the
            candidates that begin with it. Else empty.
        target_topk: the target's own candidates, with full-vocabulary probabilities.
        source_topk: the source's candidates (n), draws from its tail included, with full-vocabulary probabilities; the
            transported mass a is these, rescaled to 1 if the tail is renormalised; where the outcome is ``"condition"``, those
            that agree with ``seen``.
        support: the m target candidates with their prior b; for a hard mapping the tokens that it chose, without prior.
        cost: (n, m) edits.
        plan: (n, m) mass.
        projected: the distribution over the target's vocabulary.
        tail_mass: 1 minus the sum of ``projected``.
    """

    doc_id: int
    segment: int
    position: int
    context: tuple[PairedToken, ...]
    gold_next: str | None
    source_position: int
    exact_context: bool
    outcome: str
    seen: str
    target_topk: tuple[TokenProb, ...]
    source_topk: tuple[TokenProb, ...]
    support: tuple[TokenProb, ...]
    cost: np.ndarray
    plan: np.ndarray
    projected: tuple[TokenProb, ...]
    tail_mass: float


def token_text(vocabulary: Vocabulary, token_id: int) -> str:
    """Return the token's text with escaped bytes where it is not UTF-8."""
    return _escaped(vocabulary.token_bytes[token_id])


def _escaped(text: bytes) -> str:
    return text.decode("utf-8", errors="backslashreplace")


def explain_position(
    *,
    doc_id: int,
    segment: int,
    position: int,
    outcome: str,
    target: tuple[Side, ModelRows],
    source: tuple[Side, ModelRows] | None,
    aligned: AlignedSegment,
    config: AlignConfig,
) -> AlignmentExplanation:
    """Explain what ``SegmentAligner.align`` did at one target position.

    Args:
        doc_id: document of the segment, copied to the result.
        segment: number of the segment, copied to the result.
        position: a target position of the segment.
        outcome: the position's outcome in words.
        target: the target's tokenizer and rows.
        source: the source's tokenizer and rows; None if the source has no row for the segment.
        aligned: result of ``SegmentAligner.align``.
        config: settings; candidates are shown as far as their window goes.

    Raises:
        ValueError: the segment has no such position.
    """
    target_side, target_rows = target
    if not 0 <= position < len(target_rows):
        raise ValueError(
            f"position {position} of segment {segment} of document {doc_id}: expected 0 to {len(target_rows) - 1}"
        )
    taken = int(aligned.source_position[position])
    source_topk: tuple[TokenProb, ...] = ()
    if source is not None and taken >= 0:
        source_side, source_rows = source
        read = source_rows.exact if position in aligned.seen else source_rows
        source_topk = _candidates(source_side.vocabulary, read, taken, config)
    support, cost, plan = _problem(target_side.vocabulary, position, aligned, num_source=len(source_topk))
    has_next = position + 1 < len(target_rows)
    return AlignmentExplanation(
        doc_id=doc_id,
        segment=segment,
        position=position,
        context=_context(position, target, source, aligned),
        gold_next=token_text(target_side.vocabulary, int(target_rows.token_ids[position + 1])) if has_next else None,
        source_position=taken,
        exact_context=bool(aligned.exact_context[position]),
        outcome=outcome,
        seen=_escaped(aligned.seen.get(position, b"")),
        target_topk=_candidates(target_side.vocabulary, target_rows, position, config),
        source_topk=source_topk,
        support=support,
        cost=cost,
        plan=plan,
        projected=_sparse(target_side.vocabulary, aligned.ids[position], aligned.probs[position]),
        tail_mass=float(aligned.tail_mass[position]),
    )


def _sparse(vocabulary: Vocabulary, ids: np.ndarray, probs: np.ndarray) -> tuple[TokenProb, ...]:
    return tuple(
        TokenProb(token_text(vocabulary, token_id), prob)
        for token_id, prob in zip(ids.tolist(), probs.tolist(), strict=True)
        if token_id != NO_ID
    )


def _candidates(vocabulary: Vocabulary, rows: ModelRows, position: int, config: AlignConfig) -> tuple[TokenProb, ...]:
    here = slice(position, position + 1)
    top_k = config.top_k + rows.num_draws
    ids, probs = narrow(rows.topk_ids[here], rows.topk_probs[here], top_k=top_k, top_p=config.top_p)
    return _sparse(vocabulary, ids[0], probs[0])


def _problem(
    vocabulary: Vocabulary, position: int, aligned: AlignedSegment, *, num_source: int
) -> tuple[tuple[TokenProb, ...], np.ndarray, np.ndarray]:
    """Return support, cost and plan of the position's transport problem, pads left out.

    A candidate of the source that was not moved (a special token without a counterpart) has a row of zeros.
    """
    problems = aligned.problems
    matching = np.empty(0, np.int64) if problems is None else np.flatnonzero(problems.positions == position)
    if problems is None or not len(matching):
        return (), np.zeros((0, 0)), np.zeros((0, 0))
    index = int(matching[0])
    real = np.ix_(np.arange(num_source), problems.support_ids[index] != NO_ID)
    support = _sparse(vocabulary, problems.support_ids[index], problems.prior[index])
    return support, problems.cost[index][real], problems.plan[index][real]


def _context(
    position: int, target: tuple[Side, ModelRows], source: tuple[Side, ModelRows] | None, aligned: AlignedSegment
) -> tuple[PairedToken, ...]:
    target_side, target_rows = target
    around = range(max(0, position - CONTEXT_TOKENS), min(len(target_rows), position + CONTEXT_TOKENS + 1))
    tokens = []
    for here in around:
        start, end = int(aligned.pairing.start[here]), int(aligned.pairing.end[here])
        texts: tuple[str, ...] = ()
        if source is not None and start >= 0:
            source_side, source_rows = source
            texts = tuple(token_text(source_side.vocabulary, i) for i in source_rows.token_ids[start:end].tolist())
        text = token_text(target_side.vocabulary, int(target_rows.token_ids[here]))
        tokens.append(PairedToken(here, text, start, texts, bool(aligned.exact_context[here])))
    return tuple(tokens)
