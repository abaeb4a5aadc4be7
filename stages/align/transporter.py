"""Move the source's probability mass to target tokens, by solving transport problems or by a hard mapping."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Literal, Self

import numpy as np

from stages.align.conditioning import ConditionedCandidates
from stages.align.config import AlignConfig
from stages.align.costs.build import build_costs
from stages.align.costs.rest import RestCosts
from stages.align.rows import ModelRows, narrow
from stages.align.transport.hard_mapping import NearestTokens, hard_plan
from stages.align.transport.moved_mass import UNKNOWN_TEXT, moved_share, text_numbers
from stages.align.transport.sinkhorn import semi_relaxed, sinkhorn
from stages.align.transport.support import target_support, union_support
from stages.align.vocabulary_maps import NO_ID, ModelPair
from stages.models.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class TransportBatch:
    """Transport plans for P target positions of a segment, together with the inputs they were computed from.

    n counts source candidates and m target candidates, the *support*; both are padded to the widest position.

    Attributes:
        positions: (P,) target positions.
        source_ids: (P, n) source candidates; -1 at pads. At a position inside a source token, the rest of each candidate's
            text is transported instead of the whole token.
        source_mass: (P, n) a, the source marginal.
        support_ids: (P, m) target candidates; -1 at pads.
        prior: (P, m) b, the target marginal or prior; rows sum to 1. Zeros for a method without a prior.
        cost: (P, n, m) in edits.
        plan: (P, n, m); rows sum to the source's mass, or to 0 for a candidate that a hard mapping has no token for.
        marginal_error: (P,) largest violation of a binding marginal, relative to the source's mass.
        converged: (P,) bool.
        mass_moved: (P,) share of the projected mass that lands on a token of a different text.
        same_text: (P, n, m) bool; source candidate (or its rest) and target candidate have the same text; False at pads.
    """

    positions: np.ndarray
    source_ids: np.ndarray
    source_mass: np.ndarray
    support_ids: np.ndarray
    prior: np.ndarray
    cost: np.ndarray
    plan: np.ndarray
    marginal_error: np.ndarray
    converged: np.ndarray
    mass_moved: np.ndarray
    same_text: np.ndarray

    @classmethod
    def joined(cls, batches: Sequence["TransportBatch"]) -> Self:
        """Join several batches into one, sorted by position.

        All batches have the same n. Narrower supports are padded to the widest m.
        """
        width = max(batch.support_ids.shape[1] for batch in batches)

        def widened(values: np.ndarray, pad: float) -> np.ndarray:
            missing = [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])]
            return np.pad(values, missing, constant_values=pad)

        order = np.argsort(np.concatenate([batch.positions for batch in batches]), kind="stable")
        pads = {"support_ids": NO_ID, "prior": 0.0, "cost": 0.0, "plan": 0.0, "same_text": False}
        columns = {
            field.name: np.concatenate(
                [
                    widened(getattr(batch, field.name), pads[field.name])
                    if field.name in pads
                    else getattr(batch, field.name)
                    for batch in batches
                ]
            )[order]
            for field in fields(cls)
        }
        return cls(**columns)

    def unmapped_share(self) -> np.ndarray:
        """Return the share of the source's mass that the plan leaves out, (P,)."""
        total = self.source_mass.sum(axis=1)
        return np.maximum(
            0.0, 1.0 - np.divide(self.plan.sum(axis=(1, 2)), total, out=np.zeros_like(total), where=total > 0)
        )


class Transporter:
    """Transport of the source's mass at the positions of a segment, by the configured method.

    Args:
        config: settings of the align stage.
        pair: the two models; only the maps that the settings need are computed.
        cache_slots: number of distances that are remembered. None: the cost's own default.
    """

    def __init__(self, config: AlignConfig, pair: ModelPair, *, cache_slots: int | None = None) -> None:
        self._config = config
        self._numbers = _text_numbers(pair)
        self.projection: Literal["argmax", "plan"] = config.projection if config.method == "transport" else "plan"
        if config.method == "transport":
            self._costs = build_costs(config.cost, pair, num_slots=cache_slots)
            self._first_token = pair.first_token if config.support == "union" else None
            # The rest of a source token never stands at the start of a text, so the pair for starts needs no rest costs.
            self._rests = RestCosts(pair) if config.inexact == "condition" and pair.start_mark is None else None
            self._target_ids = np.arange(pair.target.size, dtype=np.int32)
            return
        self._costs = build_costs("edit-distance", pair, num_slots=cache_slots)
        self._exact = pair.exact
        self._nearest = NearestTokens(
            pair.source,
            pair.target,
            source_texts=pair.source_texts,
            target_texts=pair.target_texts,
            exact=pair.exact,
            preferred=pair.preferred,
        )

    def transport(
        self, target: ModelRows, positions: np.ndarray, source_ids: np.ndarray, source_mass: np.ndarray
    ) -> TransportBatch:
        """Transport the source's mass at P positions.

        Args:
            target: the target's rows.
            positions: (P,) target positions.
            source_ids: (P, n) source candidates; -1 at pads.
            source_mass: (P, n) mass of each candidate.
        """
        target_ids, target_probs = self._target_top_k(target, positions)  # (P, top_k) each
        if self._config.method != "transport":
            return self._map(positions, source_ids, source_mass, target_ids)
        if self._first_token is not None:
            support_ids, prior = union_support(target_ids, target_probs, source_ids, self._first_token)
        else:
            support_ids, prior = target_support(target_ids, target_probs)
        return self._solve(
            positions=positions,
            source_ids=source_ids,
            source_mass=source_mass,
            source_numbers=np.where(source_ids != NO_ID, self._numbers[0][source_ids], UNKNOWN_TEXT),
            support_ids=support_ids,
            prior=prior,
            cost=self._costs.costs(source_ids, support_ids),
        )

    def transport_rests(
        self, target: ModelRows, candidates: ConditionedCandidates, source: Vocabulary
    ) -> TransportBatch:
        """Transport the source's mass at Q positions inside source tokens.

        Bytes at the start of each candidate were read already: only the rest of its text is transported.

        Args:
            target: the target's rows.
            candidates: source candidates that agree with the bytes read so far.
            source: the source's vocabulary.
        """
        assert self._rests is not None
        positions = candidates.positions
        target_ids, target_probs = self._target_top_k(target, positions)
        source_ids = candidates.source_ids  # (Q, n)
        # Only real candidates have a rest: (C,) row and column of each, scattered back to (Q, n) below.
        rows, columns = np.nonzero(source_ids != NO_ID)
        numbers = self._rests.numbers(
            [candidates.seen[row] for row in rows.tolist()],
            [source.token_bytes[token_id] for token_id in source_ids[rows, columns].tolist()],
        )
        rests, exact, first = (np.full(source_ids.shape, NO_ID, np.int32) for _ in range(3))
        rests[rows, columns] = numbers
        exact[rows, columns] = self._rests.exact(numbers)
        if self._config.support == "union":
            first[rows, columns] = self._rests.first_token(numbers)
            # `first` holds target tokens, not source tokens, so the map from a token to its first target token is the identity.
            support_ids, prior = union_support(target_ids, target_probs, first, self._target_ids)
        else:
            support_ids, prior = target_support(target_ids, target_probs)
        return self._solve(
            positions=positions,
            source_ids=source_ids,
            source_mass=candidates.mass,
            source_numbers=np.where(exact != NO_ID, self._numbers[1][exact], UNKNOWN_TEXT),
            support_ids=support_ids,
            prior=prior,
            cost=self._rests.costs(rests, support_ids),
        )

    def _map(
        self, positions: np.ndarray, source_ids: np.ndarray, source_mass: np.ndarray, target_ids: np.ndarray
    ) -> TransportBatch:
        """Map each candidate, with all its mass, to one target token (a hard mapping)."""
        if self._config.method == "exact":
            mapped = np.where(source_ids != NO_ID, self._exact[source_ids], NO_ID)
        else:
            mapped = self._nearest.map(source_ids, target_ids, self._costs.costs(source_ids, target_ids))
        support_ids, plan = hard_plan(mapped, source_mass)
        source_numbers = np.where(source_ids != NO_ID, self._numbers[0][source_ids], UNKNOWN_TEXT)
        return TransportBatch(
            positions=positions,
            source_ids=source_ids,
            source_mass=source_mass,
            support_ids=support_ids,
            prior=np.zeros(support_ids.shape),
            cost=self._costs.costs(source_ids, support_ids),
            plan=plan,
            marginal_error=np.zeros(len(positions)),
            converged=np.ones(len(positions), np.bool_),
            mass_moved=self._moved(plan, source_numbers, support_ids),
            same_text=self._same_text(source_numbers, support_ids),
        )

    def _target_top_k(self, target: ModelRows, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the target's own candidates at P positions and their probabilities, (P, n) each."""
        config = self._config
        return narrow(target.topk_ids[positions], target.topk_probs[positions], top_k=config.top_k, top_p=config.top_p)

    def _solve(
        self,
        *,
        positions: np.ndarray,
        source_ids: np.ndarray,
        source_mass: np.ndarray,
        source_numbers: np.ndarray,
        support_ids: np.ndarray,
        prior: np.ndarray,
        cost: np.ndarray,
    ) -> TransportBatch:
        """Solve the transport problems. ``source_numbers`` (P, n) numbers the text of each candidate."""
        config = self._config
        # The solvers take distributions; the mass in the window, which may be less than 1, is multiplied back below.
        total = source_mass.sum(axis=1)  # (P,)
        share = source_mass / total[:, None]  # (P, n)
        if config.marginals == "balanced":
            plan, error, converged, _ = sinkhorn(
                cost,
                share,
                prior,
                epsilon=config.epsilon,
                tolerance=config.tolerance,
                max_iterations=config.max_iterations,
            )
        else:
            plan = semi_relaxed(cost, share, prior, epsilon=config.epsilon)
            # Only the source's marginal binds, and the closed form meets it up to rounding.
            error = np.abs(plan.sum(axis=2) - share).max(axis=1, initial=0.0)
            converged = np.ones(len(positions), np.bool_)
        plan = plan * total[:, None, None]
        return TransportBatch(
            positions=positions,
            source_ids=source_ids,
            source_mass=source_mass,
            support_ids=support_ids,
            prior=prior,
            cost=cost,
            plan=plan,
            marginal_error=error,
            converged=converged,
            mass_moved=self._moved(plan, source_numbers, support_ids),
            same_text=self._same_text(source_numbers, support_ids),
        )

    def _same_text(self, source_numbers: np.ndarray, support_ids: np.ndarray) -> np.ndarray:
        is_pair = (source_numbers != UNKNOWN_TEXT)[:, :, None] & (support_ids != NO_ID)[:, None, :]
        return is_pair & (source_numbers[:, :, None] == self._numbers[1][support_ids][:, None, :])

    def _moved(self, plan: np.ndarray, source_numbers: np.ndarray, support_ids: np.ndarray) -> np.ndarray:
        return moved_share(
            plan, source_numbers, self._numbers[1][support_ids], largest_only=self.projection == "argmax"
        )


def _text_numbers(pair: ModelPair) -> tuple[np.ndarray, np.ndarray]:
    """Return ``text_numbers`` of a pair, which keeps them."""

    @cache  # both sides are numbered together
    def computed() -> tuple[np.ndarray, np.ndarray]:
        return text_numbers(pair.source, pair.target)

    return pair.keep("source-text", lambda: computed()[0]), pair.keep("target-text", lambda: computed()[1])
