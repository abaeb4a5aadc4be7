"""MinCE and AvgCE: weights of the candidates at each position.

Source: PTA-LLM, "Fusion Strategy"; FuseLLM, section 3.3 (Wan et al. 2024).
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from stages.contract.columns import PAD_ID, SparseRows
from stages.fuse.mix import Candidate
from stages.measures.teacher import TEACHER_FLOOR

Function = Literal["min-ce", "avg-ce"]


def candidate_weights(cross_entropy: np.ndarray, present: np.ndarray, *, function: Function) -> np.ndarray:
    """Compute the candidates' weights at each position.

    A candidate whose cross-entropy is unknown (NaN: its span has no counted token) ranks after all others; if it is
    unknown for all that have a distribution, they tie. Of tied candidates MinCE takes the first.

    Args:
        cross_entropy: (N, C), how well each candidate's model knows the gold text around the position; lower is better.
        present: (N, C) bool, the candidate has a distribution at the position.
        function: ``"min-ce"``: all weight on the lowest; ``"avg-ce"``: proportional to exp(-CE).

    Returns:
        (N, C) float64; a row sums to 1, or is zero where no candidate has a distribution.

    Raises:
        ValueError: the shapes differ.
    """
    if cross_entropy.shape != present.shape:
        raise ValueError(f"cross_entropy has shape {cross_entropy.shape}, present {present.shape}; both are (N, C)")
    relative = _behind_the_best(cross_entropy, present)
    scores = np.exp(-relative)  # the best candidate's is 1: neither overflow nor a row of zeros
    if function == "min-ce":
        scores = np.where(present, np.arange(present.shape[1]) == relative.argmin(axis=1)[:, None], 0.0)
    total = scores.sum(axis=1, keepdims=True)
    return np.divide(scores, total, out=np.zeros_like(scores), where=total > 0)


def win_shares(cross_entropy: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Compute who wins at each position: the candidate with the lowest cross-entropy; tied candidates share the win.

    ``candidate_weights`` must choose, and takes the first of tied candidates. Win rates that counted this choice would
    favour the target, which is the first.

    Args:
        cross_entropy: (N, C), NaN where unknown, as for ``candidate_weights``.
        present: (N, C) bool, the candidate has a distribution at the position.

    Returns:
        (N, C) float64; a row sums to 1, or is zero where no candidate has a distribution.
    """
    is_best = present & (_behind_the_best(cross_entropy, present) == 0)
    return is_best / np.maximum(is_best.sum(axis=1, keepdims=True), 1)


def _behind_the_best(cross_entropy: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Compute how far each candidate is behind the best of its position, (N, C); infinite without a distribution."""
    known = np.where(np.isnan(cross_entropy), np.inf, cross_entropy.astype(np.float64))
    best = np.where(present, known, np.inf).min(axis=1, initial=np.inf)
    relative = np.where(np.isinf(best)[:, None], 0.0, known - np.where(np.isinf(best), 0.0, best)[:, None])
    return np.where(present, relative, np.inf)


def gold_probability(rows: SparseRows, gold: np.ndarray) -> np.ndarray:
    """Return the probability that each row gives its gold token, at least ``TEACHER_FLOOR``.

    A gold token outside the row counts as the floor whether or not the row has a tail: the tail is the mass of all
    tokens outside together, and crediting it to one of them would favour a row for probability that it did not assign.

    Args:
        rows: N distributions.
        gold: (N,) the gold next token's ids.

    Returns:
        (N,) float64.
    """
    hit = (rows.ids == gold[:, None]) & (rows.ids != PAD_ID)
    probs = np.where(hit, np.exp(rows.logprobs.astype(np.float64)), 0.0).sum(axis=1)
    return np.maximum(probs, TEACHER_FLOOR)


def token_cross_entropy(candidates: Sequence[Candidate], gold: np.ndarray) -> np.ndarray:
    """Return -ln of what each candidate gives the gold next token, (N, C) nats: granularity ``"token"``.

    Where rows have draws, this uses the completed probability of only the exact entries (NaN where they give none); otherwise
    the row's own probability, see ``gold_probability``.
    """
    return np.stack(
        [
            -np.log(gold_probability(candidate.rows, gold))
            if candidate.gold_logprob is None
            else -candidate.gold_logprob
            for candidate in candidates
        ],
        axis=1,
    )


def block_cross_entropy(segment_ce: np.ndarray, segment: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Average the cross-entropies of a block's pieces (granularity ``"block"``).

    Args:
        segment_ce: (S, C) of each segment under each candidate's model; NaN where it has none.
        segment: (P,) the segment each piece belongs to.
        block: (P,) the block of each piece, from 0, nondecreasing.

    Returns:
        (num_blocks, C); NaN for a model without any segment in the block.
    """
    num_blocks = int(block[-1]) + 1 if len(block) else 0
    piece_ce = segment_ce[segment]
    known = ~np.isnan(piece_ce)
    total = np.zeros((num_blocks, segment_ce.shape[1]))
    count = np.zeros_like(total)
    np.add.at(total, block, np.where(known, piece_ce, 0.0))
    np.add.at(count, block, known)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
