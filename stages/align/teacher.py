"""Fair comparisons, by teacher NLL, of several ways to get distributions over the target's vocabulary.

Ways of aligning cover different positions, and easy positions are the first to be covered: a comparison is of the
positions that all of them have.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from stages.align.rows import narrow
from stages.measures.standard_error import Estimate, clustered_mean
from stages.measures.teacher import floored_nll

_SHARES: Final = np.linspace(0, 1, 41)


def top_k_nll(ids: np.ndarray, probs: np.ndarray, gold: np.ndarray, *, top_k: int, top_p: float | None) -> np.ndarray:
    """Compute ``floored_nll`` of a model's own window, as narrow as an aligned row's.

    Args:
        ids: (P, k) the model's largest entries, descending; -1 at pads.
        probs: (P, k) their probabilities over the full vocabulary; 0 at pads.
        gold: (P,) the model's own next tokens; negative: there is none.
        top_k: the most entries that count.
        top_p: probability that the entries must hold; see ``rows.narrow``.
    """
    return floored_nll(*narrow(ids, probs, top_k=top_k, top_p=top_p), gold)


def mixture_nll(nll: np.ndarray, other: np.ndarray) -> tuple[float, np.ndarray]:
    """Mix two distributions with the share that predicts the gold tokens best, the same at all positions.

    Args:
        nll: (P,) nats, finite.
        other: (P,) at the same positions.

    Returns:
        The other's share, in steps of 1/40, and the mixture's (P,) nats. The share is chosen on these very positions: with
        a few hundred of them that flatters the mixture by less than its standard error.
    """
    probs, others = np.exp(-nll), np.exp(-other)
    mixtures = (-np.log((1 - share) * probs + share * others) for share in _SHARES)
    best, mixed_nll = min(enumerate(mixtures), key=lambda mixture: float(mixture[1].sum()))
    return float(_SHARES[best]), mixed_nll


@dataclass(frozen=True)
class ComparedNll:
    """Result of one entry of a comparison; means in nats, with standard errors over documents.

    Attributes:
        nll: NLL on the shared positions.
        difference: difference from the baseline there, paired.
        mixed_difference: difference of the best mixture of entry and baseline there from the baseline, paired: what the
            entry adds. An entry that merely leans to a better baseline has a lower NLL, but adds nothing.
        mixed_share: the baseline's share in that mixture.
        num_positions: number of positions that this entry has.
        coverage: share of all positions that this entry has.
        own_difference: difference from the baseline, paired, on all positions that this entry has. Only this figure includes
            positions that the other entries lack.
    """

    nll: Estimate
    difference: Estimate
    mixed_difference: Estimate
    mixed_share: float
    num_positions: int
    coverage: float
    own_difference: Estimate


@dataclass(frozen=True)
class SharedNll:
    """A comparison on the same positions.

    Attributes:
        num_positions: positions that every entry has.
        num_documents: documents that those are in.
        entries: entries, in the order given; means are NaN where there are no positions.
    """

    num_positions: int
    num_documents: int
    entries: dict[str, ComparedNll]


def compare_shared(nll: Mapping[str, np.ndarray], *, documents: np.ndarray, baseline: str) -> SharedNll:
    """Compare several distributions on the positions that all of them have.

    To compare ways of aligning: run ``AlignStage`` with each configuration on the same inputs; for each, join the
    segments' ``completed_nll`` in the order of the target's rows; the target itself and the source itself (at an
    alignment's ``source_position``) are their ``exact_nll``. For the floored figure: ``floored_nll``, and ``top_k_nll``.

    Args:
        nll: name -> (P,) nats, NaN where an entry has no distribution; the same P positions in each.
        documents: (P,) the document that each position is in.
        baseline: the entry that the others are compared with.

    Raises:
        ValueError: nothing to compare, no such baseline, or entries of different lengths: they cannot be of the same
            positions.
    """
    lengths = {**{name: len(values) for name, values in nll.items()}, "documents": len(documents)}
    if not nll or len(set(lengths.values())) != 1:
        raise ValueError(f"numbers of positions {lengths}: expected one number, of at least one entry")
    if baseline not in nll:
        raise ValueError(f"there is no entry {baseline!r} to compare with, only {', '.join(nll)}")
    present = {name: np.isfinite(values) for name, values in nll.items()}
    shared = np.logical_and.reduce(list(present.values()))  # (P,) bool
    entries = {}
    for name, values in nll.items():
        both_present = present[name] & present[baseline]
        difference = values - nll[baseline]
        share, mixed = mixture_nll(values[shared], nll[baseline][shared])
        entries[name] = ComparedNll(
            nll=clustered_mean(values[shared], documents[shared]),
            difference=clustered_mean(difference[shared], documents[shared]),
            mixed_difference=clustered_mean(mixed - nll[baseline][shared], documents[shared]),
            mixed_share=share,
            num_positions=int(present[name].sum()),
            coverage=float(present[name].mean()) if len(values) else math.nan,
            own_difference=clustered_mean(difference[both_present], documents[both_present]),
        )
    return SharedNll(int(shared.sum()), len(np.unique(documents[shared])), entries)
