"""The training loss, without logits or targets of the whole batch.

    L = lambda * L_CLM + (1 - lambda) * L_fusion

L_CLM is the mean over labelled positions of -ln q(gold next token), L_fusion the mean over positions that have a fused
distribution p of its cross-entropy with the model's q,

    - sum over the row's ids of p(id) ln q(id)  -  tail_mass * ln(1 - sum over the row's ids of q(id)),

so a position without a fused distribution counts in L_CLM alone. Both are means over a whole optimizer step: here are
the sums, and the caller divides by the step's counts, so that the size of a micro-batch does not change the result.

Memory: a chunk of C positions holds C x vocabulary logits in float32 (512 x 49,152: 100 MB), computed again in the
backward pass; the fused distributions stay sparse.

Source: PTA-LLM, equation of the training objective; the tail term is ours (a distribution over the ids and "the rest").
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stages.contract.columns import PAD_ID

IGNORED = -100
"""Label of a position that has no gold next token."""

REST_EPSILON = 1e-5
"""Least probability outside a row's ids that the tail term sees. In float32 ln(sum of q over the ids) is known to about
1e-6, so what lies below is rounding; a tail of mass m costs at most 11.5 m nats."""

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SparseTargets:
    """Fused distributions of P positions.

    Attributes:
        ids: (P, k) int64, ``PAD_ID`` where a row has fewer entries; a row of pads is "no distribution".
        probs: (P, k) float32, 0 at pads.
        tail_mass: (P,) float32; None where rows are rescaled to 1.
    """

    ids: Tensor
    probs: Tensor
    tail_mass: Tensor | None

    def select(self, index: Tensor | slice) -> "SparseTargets":
        """The rows at ``index``, a mask or a range."""
        return SparseTargets(
            self.ids[index], self.probs[index], None if self.tail_mass is None else self.tail_mass[index]
        )

    def to(self, device: torch.device) -> "SparseTargets":
        """The same on another device."""
        tail_mass = None if self.tail_mass is None else self.tail_mass.to(device)
        return SparseTargets(self.ids.to(device), self.probs.to(device), tail_mass)

    @property
    def present(self) -> Tensor:
        """(P,) bool: the position has a fused distribution."""
        return (self.ids != PAD_ID).any(dim=1)


def loss_sums(
    hidden: Tensor, head: Head, labels: Tensor, targets: SparseTargets | None, *, chunk_positions: int
) -> tuple[Tensor, Tensor]:
    """Sums of the two losses over P positions, differentiable.

    Args:
        hidden: (P, H), the body's output.
        head: hidden states (p, H) -> logits (p, V).
        labels: (P,) int64, the gold next tokens; ``IGNORED`` where there is none.
        targets: fused distributions of the P positions; None: L_CLM alone is computed.
        chunk_positions: positions whose logits exist at once.

    Returns:
        Sum of the CLM loss over labelled positions, sum of the fusion loss over positions with a distribution; nats.
    """
    counted = labels != IGNORED
    if targets is not None:
        counted = counted | targets.present
        targets = targets.select(counted)
    hidden, labels = hidden[counted], labels[counted]
    clm, fusion = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(labels), chunk_positions):
        part = slice(start, start + chunk_positions)
        chunk_targets = None if targets is None else targets.select(part)
        chunk_clm, chunk_fusion = checkpoint(
            _chunk_sums, hidden[part], head, labels[part], chunk_targets, use_reentrant=False, preserve_rng_state=False
        )
        clm, fusion = clm + chunk_clm, fusion + chunk_fusion
    return clm, fusion


def _chunk_sums(hidden: Tensor, head: Head, labels: Tensor, targets: SparseTargets | None) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()
    normaliser = logits.logsumexp(dim=1)
    labelled = labels != IGNORED
    gold = logits.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    clm = torch.where(labelled, normaliser - gold, 0.0).sum()
    if targets is None:
        return clm, torch.zeros_like(clm)
    entry = targets.ids != PAD_ID
    logprobs = logits.gather(1, targets.ids.clamp(min=0)) - normaliser[:, None]
    fusion = -(torch.where(entry, targets.probs * logprobs, 0.0)).sum()
    if targets.tail_mass is not None:
        present = entry.any(dim=1)
        listed = logprobs[present].masked_fill(~entry[present], -torch.inf).logsumexp(dim=1)
        fusion = fusion - (targets.tail_mass[present] * log_rest(listed)).sum()
    return clm, fusion


def log_rest(log_mass: Tensor) -> Tensor:
    """ln(1 - exp(log_mass)), what is left of 1, at least ``ln(REST_EPSILON)``; no gradient below that.

    Args:
        log_mass: ln of a probability, float32; rounding may have lifted it above 0.

    Source: Maechler 2012, "Accurately computing log(1 - exp(-|a|))".
    """
    clamped = log_mass.clamp(max=math.log1p(-REST_EPSILON))
    near_one = clamped > -math.log(2)
    # Each branch sees only values it is accurate for, so that no NaN gradient leaks through torch.where.
    from_expm1 = torch.log(-torch.expm1(torch.where(near_one, clamped, -1.0)))
    from_log1p = torch.log1p(-torch.exp(torch.where(near_one, -1.0, clamped)))
    return torch.where(near_one, from_expm1, from_log1p)
