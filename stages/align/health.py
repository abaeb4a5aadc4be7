"""Health metrics of the align stage, accumulated segment by segment."""

from typing import Final

import numpy as np

from stages.align.conditioning import Inner
from stages.align.config import AlignConfig
from stages.align.rows import ModelRows, narrow
from stages.align.segment import CONDITION, GOLD, IDENTITY, TRANSPORT, AlignedSegment
from stages.contract.columns import SparseRows
from stages.contract.manifest import Mean
from stages.measures.teacher import completed_nll, exact_nll, floored_nll

_COUNTS: Final[tuple[str, ...]] = (
    "segments",
    "positions",
    "covered",
    "exact_contexts",
    "one_to_one",
    "one_to_many",
    "many_to_one",
    "unpaired",
    "gold_fallback",
    "gold_excluded",
    "problems",
    "unconverged",
    "missing_source_segments",
    "inner_positions",
    "inner_conditioned",
    "inner_no_context",
    "inner_no_candidate",
    "inner_little_mass",
    "inner_white_space",
)
_MEANS: Final[tuple[str, ...]] = (
    "marginal_error",
    "completed_nll",
    "target_exact_nll",
    "source_exact_nll",
    "conditioned_nll",
    "conditioned_target_nll",
    "floored_nll",
    "target_floored_nll",
    "source_entropy",
    "aligned_entropy",
    "mass_moved",
    "mass_unmapped",
    "mass_special",
    "cut_mass",
)


class AlignHealth:
    """Counts and means of a shard; ``AlignStage`` describes each of them.

    Args:
        config: the settings.
        missing_target_segments: segments that the source has and the target has not.
    """

    def __init__(self, config: AlignConfig, *, missing_target_segments: int) -> None:
        self._config = config
        self._missing_target_segments = missing_target_segments
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._means = dict.fromkeys(_MEANS, Mean(total=0.0, count=0))

    @property
    def missing_source_segments(self) -> int:
        """Number of segments so far that the target has and the source does not."""
        return self._counts["missing_source_segments"]

    def add(
        self,
        aligned: AlignedSegment,
        target: ModelRows,
        source: ModelRows | None,
        *,
        judged: AlignedSegment,
        distributions: SparseRows,
    ) -> None:
        """Take in one segment.

        Args:
            aligned: result of aligning the segment.
            target: rows of the target.
            source: rows of the source without draws; None if the source has none.
            judged: ``aligned``, or if the source has draws, the result for only its exact entries.
            distributions: distributions of ``judged``, as they would be stored.
        """
        covered = _covered(aligned)
        self._count(aligned, target.has_label, len(covered), is_missing=source is None)
        self._add_mean("mass_moved", aligned.mass_moved[covered])
        self._add_mean("mass_unmapped", aligned.mass_unmapped[covered])
        self._add_mean("mass_special", aligned.mass_special[covered])
        self._add_mean("cut_mass", aligned.cut_mass[covered])
        # A draw is an unbiased estimate of mass, but its logarithm is not: from here on only exact entries count.
        covered = _covered(judged)
        self._add_teacher_nll(judged, target, distributions, covered)
        self._add_mean("aligned_entropy", _entropy(_renormalised(judged.probs[covered])))
        if source is not None:
            # Inside a source token the source's own next token is another event, and has been counted at its boundary.
            taken = judged.source_position[covered[judged.outcome[covered] != CONDITION]]
            self._add_mean("source_entropy", _entropy(self._top_k_window(source, taken)[1]))
            if source.gold_logprob is not None:
                self._add_mean("source_exact_nll", exact_nll(source.gold_logprob, taken))
        if aligned.problems is not None and self._config.method == "transport":
            self._add_mean("marginal_error", aligned.problems.marginal_error)

    def metrics(self) -> dict[str, int | Mean]:
        """Return the metrics for the manifest.

        Metrics of positions inside source tokens are left out unless these are conditioned.
        """
        metrics: dict[str, int | Mean] = {
            **self._counts,
            **self._means,
            "missing_target_segments": self._missing_target_segments,
        }
        if self._config.inexact == "condition":
            return metrics
        return {name: metric for name, metric in metrics.items() if not name.startswith(("inner_", "conditioned_"))}

    def _add_teacher_nll(
        self, aligned: AlignedSegment, target: ModelRows, distributions: SparseRows, covered: np.ndarray
    ) -> None:
        ids, probs = distributions.ids[covered], np.exp(distributions.logprobs[covered].astype(np.float64))
        gold = target.token_ids[covered + 1]
        self._add_mean("floored_nll", floored_nll(ids, probs, gold))
        self._add_mean("target_floored_nll", floored_nll(*self._top_k_window(target, covered), gold))
        if target.gold_logprob is None:
            return
        completed = completed_nll(
            ids,
            probs,
            aligned.tail_mass[covered] if self._config.tail == "bucket" else None,
            gold,
            own_ids=target.topk_ids[covered],
            own_probs=target.topk_probs[covered],
            own_gold_logprob=target.gold_logprob[covered],
        )
        self._add_mean("completed_nll", completed)
        self._counts["gold_excluded"] += int(np.isinf(completed).sum())
        target_nll = exact_nll(target.gold_logprob, covered)
        self._add_mean("target_exact_nll", target_nll)
        # The same positions in both: those at which the row knows the gold token at all.
        conditioned = (aligned.outcome[covered] == CONDITION) & np.isfinite(completed)
        self._add_mean("conditioned_nll", completed[conditioned])
        self._add_mean("conditioned_target_nll", target_nll[conditioned])

    def _count(self, aligned: AlignedSegment, positions: np.ndarray, num_covered: int, *, is_missing: bool) -> None:
        """Count one segment, of which ``positions`` (M,) bool have a next token that is trained on."""
        span = (aligned.pairing.end - aligned.pairing.start)[positions]  # (P,), source tokens per target position
        is_paired = aligned.pairing.is_paired[positions]
        shares_source = aligned.pairing.shares_source()[positions]
        problems = aligned.problems if self._config.method == "transport" else None
        counts = {
            "segments": 1,
            "positions": len(span),
            "covered": num_covered,
            "exact_contexts": int(aligned.exact_context[positions].sum()),
            "one_to_one": int((is_paired & (span == 1) & ~shares_source).sum()),
            "one_to_many": int((is_paired & (span == 1) & shares_source).sum()),
            "many_to_one": int((is_paired & (span > 1)).sum()),
            "unpaired": int((~is_paired).sum()),
            "gold_fallback": int((aligned.outcome == GOLD).sum()),
            "problems": 0 if problems is None else len(problems.positions),
            "unconverged": 0 if problems is None else int((~problems.converged).sum()),
            "missing_source_segments": int(is_missing),
            "inner_positions": int((aligned.inner != Inner.NOT_INNER).sum()),
            **{
                f"inner_{kind.name.lower()}": int((aligned.inner == kind).sum())
                for kind in Inner
                if kind != Inner.NOT_INNER
            },
        }
        for name, count in counts.items():
            self._counts[name] += count

    def _top_k_window(self, rows: ModelRows, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return a model's candidates at these positions, with probabilities that sum to 1."""
        config = self._config
        ids, probs = narrow(
            rows.topk_ids[positions], rows.topk_probs[positions], top_k=config.top_k, top_p=config.top_p
        )
        return ids, _renormalised(probs)

    def _add_mean(self, name: str, values: np.ndarray) -> None:
        """Add finite values; NaN says that a position has none, and infinite ones are counted apart."""
        finite = values[np.isfinite(values)]
        self._means[name] += Mean(total=float(finite.sum()), count=len(finite))


def _covered(aligned: AlignedSegment) -> np.ndarray:
    """Return the positions that have the source's distribution, (P,) ascending."""
    return np.flatnonzero(np.isin(aligned.outcome, (TRANSPORT, IDENTITY, CONDITION)))


def _renormalised(probs: np.ndarray) -> np.ndarray:
    return probs / np.maximum(probs.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)


def _entropy(probs: np.ndarray) -> np.ndarray:
    """Compute the entropy, (P,) nats; zeros count nothing."""
    return -(probs * np.log(np.where(probs > 0, probs, 1.0))).sum(axis=1)
