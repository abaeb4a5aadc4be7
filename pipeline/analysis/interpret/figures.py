"""Figures per document: who wins at its positions, and how the distributions there relate to each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np

from pipeline.analysis.interpret.distances import center_distance, spread
from stages.contract.columns import PAD_ID
from stages.fuse.stage import FusedSegment
from stages.fuse.weights import token_cross_entropy, win_shares
from stages.measures.standard_error import Estimate, weighted_mean
from stages.models.token_space import TokenSpace

MAX_KINDS: Final = 20
"""Kinds of documents that are reported separately: those with the most positions. The others are counted together."""
ALL: Final = "all"


@dataclass(frozen=True, eq=False)
class DocumentFigures:
    """Totals over positions of one document; they add up. C candidates, the target's own first.

    Attributes:
        num_positions: number of positions with a next token in their segment.
        num_fused: number of those with a fused distribution.
        num_contested: number of those where more than one candidate has a distribution.
        num_tied: (2,) positions with more than one winner: as configured, and judged token by token.
        wins: (2, C) positions won, ties in equal parts: as configured, sums to ``num_fused``; and judged token by token where
            that is contested, sums to ``num_contested``.
        distances: (C + 1, 4), rows the candidates and then the fused distribution: positions that have it; over these
            its Inner Distance, that of the target's own distribution, and the Center Distance to it.
    """

    num_positions: int
    num_fused: int
    num_contested: int
    num_tied: np.ndarray
    wins: np.ndarray
    distances: np.ndarray

    def __add__(self, other: "DocumentFigures") -> "DocumentFigures":
        return DocumentFigures(
            self.num_positions + other.num_positions,
            self.num_fused + other.num_fused,
            self.num_contested + other.num_contested,
            self.num_tied + other.num_tied,
            self.wins + other.wins,
            self.distances + other.distances,
        )

    @classmethod
    def of_segment(cls, segment: FusedSegment, space: TokenSpace) -> Self:
        """Compute the figures of one segment.

        Args:
            segment: the segment as fused by the stage.
            space: the target's embeddings.
        """
        present = np.stack([candidate.rows.present for candidate in segment.candidates], axis=1)
        contested = present.sum(axis=1) > 1
        token_judged = token_cross_entropy(segment.candidates, segment.gold)
        shares = np.stack(
            [win_shares(segment.cross_entropy, present), win_shares(token_judged, present & contested[:, None])]
        )
        target = spread(segment.candidates[0].rows, space)
        others = [
            *(spread(candidate.rows, space) for candidate in segment.candidates[1:]),
            spread(segment.mixture.rows, space),
        ]
        return cls(
            num_positions=int((segment.gold != PAD_ID).sum()),
            num_fused=int(segment.present.sum()),
            num_contested=int(contested.sum()),
            num_tied=((shares > 0).sum(axis=2) > 1).sum(axis=1),
            wins=shares.sum(axis=1),
            distances=np.stack(
                [
                    _totals(distribution.inner, target.inner, center_distance(distribution, target))
                    for distribution in (target, *others)
                ]
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return {
            "num_positions": self.num_positions,
            "num_fused": self.num_fused,
            "num_contested": self.num_contested,
            "num_tied": self.num_tied.tolist(),
            "wins": self.wins.tolist(),
            "distances": self.distances.tolist(),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Restore from the result of ``to_json``."""
        return cls(
            values["num_positions"],
            values["num_fused"],
            values["num_contested"],
            np.array(values["num_tied"]),
            np.array(values["wins"]),
            np.array(values["distances"]),
        )


def _totals(inner: np.ndarray, own_inner: np.ndarray, center: np.ndarray) -> list[float]:
    known = np.isfinite(center)  # both distributions are there
    return [float(known.sum()), *(float(values[known].sum()) for values in (inner, own_inner, center))]


def distance_rows(documents: Sequence[DocumentFigures], names: Sequence[str]) -> list[dict[str, Any]]:
    """Average the distances of each distribution, with standard errors over documents.

    Args:
        documents: their figures.
        names: names of the C + 1 distributions.
    """
    totals = np.stack([document.distances for document in documents]) if documents else np.zeros((0, len(names), 4))
    rows = []
    for index, name in enumerate(names):
        count, inner, own_inner, center = totals[totals[:, index, 0] > 0, index].T
        rows.append(
            {
                "name": name,
                "num_positions": int(count.sum()),
                "inner": estimate_json(weighted_mean(inner / count, count)),
                "own_inner": estimate_json(weighted_mean(own_inner / count, count)),
                "inner_difference": estimate_json(weighted_mean((inner - own_inner) / count, count)),
                "center": estimate_json(weighted_mean(center / count, count)),
            }
        )
    return rows


def win_rows(documents: Sequence[DocumentFigures], kinds: Sequence[str], names: Sequence[str]) -> list[dict[str, Any]]:
    """Compute the win rates of each candidate by kind of document: all documents first, then kinds by number of positions.

    Args:
        documents: their figures.
        kinds: kind of each document.
        names: names of the C candidates.

    Returns:
        JSON values; ``shares`` of fused positions as configured, ``token_shares`` of contested ones judged token by token.
    """
    groups: dict[str, list[DocumentFigures]] = {}
    for document, kind in zip(documents, kinds, strict=True):
        groups.setdefault(kind, []).append(document)
    ordered = sorted(groups.items(), key=lambda group: (-sum(document.num_fused for document in group[1]), group[0]))
    rows = [_win_row(ALL, documents, names), *(_win_row(kind, group, names) for kind, group in ordered[:MAX_KINDS])]
    rest = [document for _, group in ordered[MAX_KINDS:] for document in group]
    if rest:
        rows.append(_win_row(f"{len(ordered) - MAX_KINDS} other kinds", rest, names))
    return rows


def _win_row(kind: str, documents: Sequence[DocumentFigures], names: Sequence[str]) -> dict[str, Any]:
    wins = np.stack([document.wins for document in documents])  # (documents, 2, C)
    num_fused = np.array([document.num_fused for document in documents])
    num_contested = np.array([document.num_contested for document in documents])
    num_tied = np.sum([document.num_tied for document in documents], axis=0)
    return {
        "kind": kind,
        "num_documents": len(documents),
        "num_positions": sum(document.num_positions for document in documents),
        "num_fused": int(num_fused.sum()),
        "num_tied": int(num_tied[0]),
        "shares": _shares(wins[:, 0], num_fused, names),
        "num_contested": int(num_contested.sum()),
        "num_token_tied": int(num_tied[1]),
        "token_shares": _shares(wins[:, 1], num_contested, names),
    }


def _shares(wins: np.ndarray, count: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Average wins (D, C) over (D,) counted positions; documents without any are left out."""
    wins, count = wins[count > 0], count[count > 0]
    return {name: estimate_json(weighted_mean(wins[:, index] / count, count)) for index, name in enumerate(names)}


def estimate_json(estimate: Estimate) -> dict[str, float | None]:
    """Convert an estimate to JSON, which has no NaN."""
    return {name: value if np.isfinite(value) else None for name, value in estimate._asdict().items()}
