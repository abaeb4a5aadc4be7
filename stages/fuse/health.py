"""What a fused shard's manifest reports."""

from collections.abc import Sequence

import numpy as np

from stages.contract.columns import PAD_ID, SparseRows
from stages.contract.manifest import Mean
from stages.fuse.weights import gold_probability


class HealthCounts:
    """Adds up the health figures of a shard, segment by segment."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.num_positions = 0
        self.num_fused = 0
        self.chosen = np.zeros(len(names), np.int64)
        self.teacher_nats = 0.0
        self.target_nats = 0.0
        self.num_target = 0
        self.cut_mass = 0.0

    def add(
        self,
        *,
        fused: SparseRows,
        target: SparseRows,
        gold: np.ndarray,
        chosen: np.ndarray,
        cut_mass: np.ndarray,
    ) -> None:
        """Count one segment.

        Args:
            fused: the N fused distributions.
            target: the target's own, over the same positions.
            gold: (N,) the gold next tokens.
            chosen: (N,) index of the candidate with the largest weight, -1 where there is no fused distribution.
            cut_mass: (N,) mass of the entries beyond top_k.
        """
        present = fused.present
        both = present & target.present
        self.num_positions += int((gold != PAD_ID).sum())
        self.num_fused += int(present.sum())
        self.chosen += np.bincount(chosen[present], minlength=len(self.names))
        self.teacher_nats -= float(np.log(gold_probability(fused, gold))[present].sum())
        self.target_nats -= float(np.log(gold_probability(_rescaled(target), gold))[both].sum())
        self.num_target += int(both.sum())
        self.cut_mass += float(cut_mass[present].sum())

    def figures(self) -> dict[str, int | Mean]:
        """By name.

        ``positions``: target positions with a next token in their segment; ``fused``: those with a fused distribution;
        ``chosen/<name>``: how often each candidate has the largest weight; ``teacher_nll`` and ``target_nll``: -ln of
        what the fused distribution as stored, and the target's own top-k rescaled to 1 (as in align's figure), give the
        gold next token, floor ``TEACHER_FLOOR``, on positions with a fused distribution;
        ``cut_mass``: what top_k cut off.
        """
        return {
            "positions": self.num_positions,
            "fused": self.num_fused,
            **{f"chosen/{name}": int(count) for name, count in zip(self.names, self.chosen, strict=True)},
            "teacher_nll": Mean(total=self.teacher_nats, count=self.num_fused),
            "target_nll": Mean(total=self.target_nats, count=self.num_target),
            "cut_mass": Mean(total=self.cut_mass, count=self.num_fused),
        }


def _rescaled(rows: SparseRows) -> SparseRows:
    """The same with each row's probabilities summing to 1."""
    mass = np.exp(rows.logprobs.astype(np.float64)).sum(axis=1, keepdims=True)
    return SparseRows(rows.ids, (rows.logprobs - np.log(np.where(mass > 0, mass, 1.0))).astype(np.float32))
