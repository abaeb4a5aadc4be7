"""Health metrics in the manifest of a fused shard."""

from collections.abc import Sequence

import numpy as np

from stages.contract.columns import SparseRows
from stages.contract.manifest import Mean
from stages.fuse.mix import Mixture
from stages.measures.teacher import completed_nll, exact_nll, floored_nll


class HealthCounts:
    """Accumulator of the health metrics of a shard, segment by segment.

    Args:
        names: names of the candidates, the target's own first.
        top_k: entries of a fused row.
        has_tail: fused rows have a tail mass.
    """

    def __init__(self, names: Sequence[str], *, top_k: int, has_tail: bool) -> None:
        self._names = names
        self._top_k = top_k
        self._has_tail = has_tail
        self._num_positions = 0
        self._num_fused = 0
        self._chosen = np.zeros(len(names), np.int64)
        self._cut_mass = 0.0
        self._teacher = _TeacherNll()
        self._chosen_by_gold = _TeacherNll()

    def add(
        self,
        *,
        mixture: Mixture,
        target: SparseRows,
        gold: np.ndarray,
        gold_logprob: np.ndarray,
        chosen: np.ndarray,
        chosen_by_gold: np.ndarray,
        mixed_gold_logprob: np.ndarray | None = None,
    ) -> None:
        """Count one segment.

        Args:
            mixture: the N fused distributions.
            target: the target's own window, over the same positions, as its logits have it.
            gold: (N,) the gold next tokens; ``PAD_ID``: there is none.
            gold_logprob: (N,) their logprobs under the target, over the full vocabulary.
            chosen: (N,) index of the candidate with the largest weight, -1 where there is no fused distribution.
            chosen_by_gold: (N,) bool; the gold token itself decided what the distribution is.
            mixed_gold_logprob: (N,) gold logprobs by which distributions with draws are judged, see ``mix.mixed_gold_logprob``;
                None: the distributions are exact. With it there are no floored metrics: exact rows are not stored.
        """
        rows = mixture.rows
        present = rows.present
        self._num_positions += int((gold >= 0).sum())
        self._num_fused += int(present.sum())
        self._chosen += np.bincount(chosen[present], minlength=len(self._names))
        self._cut_mass += float(mixture.cut_mass[present].sum())
        probs, own_probs = (np.exp(sparse_rows.logprobs.astype(np.float64)) for sparse_rows in (rows, target))
        metrics = {"target_exact_nll": exact_nll(gold_logprob, np.arange(len(gold)))}
        if mixed_gold_logprob is not None:
            metrics["completed_nll"] = -mixed_gold_logprob
        else:
            metrics["completed_nll"] = completed_nll(
                rows.ids,
                probs,
                mixture.tail_mass if self._has_tail else None,
                gold,
                own_ids=target.ids,
                own_probs=own_probs,
                own_gold_logprob=gold_logprob,
            )
            metrics["floored_nll"] = floored_nll(rows.ids, probs, gold)
            metrics["target_floored_nll"] = floored_nll(target.ids[:, : self._top_k], own_probs[:, : self._top_k], gold)
        self._teacher.add(metrics, present & ~chosen_by_gold)
        self._chosen_by_gold.add(metrics, present & chosen_by_gold)

    def metrics(self) -> dict[str, int | Mean]:
        """Return the metrics by name.

        ``positions``: target positions with a next token in their segment; ``fused``: those with a fused distribution;
        ``chosen/<name>``: how often each candidate has the largest weight; ``cut_mass``: what top_k cut off.

        ``completed_nll``, ``target_exact_nll``, ``floored_nll``, ``target_floored_nll``, ``gold_excluded``: of the fused
        distributions, as align's are of the aligned ones. A distribution that the gold token itself decided (all mass on
        it, or granularity ``"token"`` with a choice) would be judged by what chose it: such positions are left out there,
        and have the same metrics under ``chosen_by_gold/``; ``chosen_by_gold`` counts them. Where rows have draws,
        ``completed_nll`` is of the weighted sum of the candidates' completed probabilities, and nothing is floored.
        """
        return {
            "positions": self._num_positions,
            "fused": self._num_fused,
            **{f"chosen/{name}": int(count) for name, count in zip(self._names, self._chosen, strict=True)},
            **self._teacher.metrics(),
            "chosen_by_gold": self._chosen_by_gold.num_positions,
            **{f"chosen_by_gold/{name}": metric for name, metric in self._chosen_by_gold.metrics().items()},
            "cut_mass": Mean(total=self._cut_mass, count=self._num_fused),
        }


class _TeacherNll:
    """Means of the teacher NLL over some positions."""

    def __init__(self) -> None:
        names = ("completed_nll", "target_exact_nll", "floored_nll", "target_floored_nll")
        self._means = {name: Mean(total=0.0, count=0) for name in names}
        self._num_excluded = 0
        self.num_positions = 0

    def add(self, metrics: dict[str, np.ndarray], where: np.ndarray) -> None:
        """Add the metrics, (N,) each, at the positions ``where``."""
        self.num_positions += int(where.sum())
        self._num_excluded += int(np.isinf(metrics["completed_nll"][where]).sum())
        for name, values in metrics.items():
            finite = values[where & np.isfinite(values)]
            self._means[name] += Mean(total=float(finite.sum()), count=len(finite))

    def metrics(self) -> dict[str, int | Mean]:
        return {**self._means, "gold_excluded": self._num_excluded}
