"""Explanation of a fused position for `ptafuse inspect`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExplainedCandidate:
    """Contribution of one model at a position.

    Attributes:
        name: name of the model.
        cross_entropy: in the configured unit over the configured span (granularity ``token``: nats); NaN if unknown.
        weight: its share in the fused distribution.
        distribution: (text of a token, probability), descending; empty where the model has none here.
        tail_mass: 1 minus the sum of the distribution.
    """

    name: str
    cross_entropy: float
    weight: float
    distribution: tuple[tuple[str, float], ...]
    tail_mass: float


@dataclass(frozen=True)
class FusionExplanation:
    """Derivation of the fused distribution of one position.

    Attributes:
        gold: text of the gold next token, None at a segment's last position.
        is_learnt: the gold next token is trained on; in a conversation, tokens of the template and of users are not.
        candidates: the target's, then the sources'.
        chosen: name of the candidate with the largest weight, None where there is no fused distribution.
        fused: (text of a token, probability), descending.
        tail_mass: 1 minus the sum of the fused distribution.
    """

    gold: str | None
    is_learnt: bool
    candidates: tuple[ExplainedCandidate, ...]
    chosen: str | None
    fused: tuple[tuple[str, float], ...]
    tail_mass: float


@dataclass(frozen=True)
class SegmentPosition:
    """Position of a segment."""

    doc_id: int
    segment: int
    position: int
