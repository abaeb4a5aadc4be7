"""What the fusion loss measures at one position: how far the model's distribution is from a sparse fused one.

A fused row lists n ids with probabilities p and may have a tail bucket, the mass r that its sources left outside the
ids (``tail_mass``); a row without a tail was rescaled to sum to 1. The model's logprobs ln q come over the whole
vocabulary; q_rest = 1 - sum over the row's ids of q is the mass that the model itself leaves outside them. So both
are compared over n + 1 outcomes, the ids and "the rest":

- ``forward-kl``, the paper's cross-entropy, which is KL(fused || model) up to a constant:

      - sum_i p_i ln q_i  -  r ln q_rest

  A row without a tail has r = 0: it asks the model to leave nothing outside the ids.

- ``reverse-kl``, KL(model || fused):

      sum_i q_i (ln q_i - ln p_i)  +  q_rest (ln q_rest - ln r)

  A row without a tail would make any mass outside its ids infinitely wrong. But it was rescaled because the mass
  outside is not known, so it is taken as what it is, a distribution *given that the next token is among the ids*, and
  the model is compared under the same condition, q'_i = q_i / sum_j q_j:

      sum_i q'_i (ln q'_i - ln p_i)

  It says nothing about the mass outside, and a row of one id says nothing at all. r is at least ``REST_EPSILON``.

A temperature t divides the log-probabilities of the outcomes of *both* sides, ln q and ln p, which are normalised
again, and the loss is multiplied by t^2, so that gradients keep their size (Hinton et al. 2015). The rest is one
outcome: how either side spreads its mass within the rest does not count at any temperature. So the loss is least
where q agrees with p on the ids and on the rest, whatever t is; with ``softmax(logits / t)`` over the whole vocabulary
it would not be, since a row's tail says nothing about a softened tail. t = 1 changes nothing.

Source: PTA-LLM, equation of the training objective; the tail, the reverse divergence and the temperature are ours.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stages.contract.columns import PAD_ID

Divergence = Literal["forward-kl", "reverse-kl"]

REST_EPSILON = 1e-5
"""Least probability outside a row's ids that the loss sees. In float32 ln(sum of q over the ids) is known to about
1e-6, so what lies below is rounding; a tail of mass m costs at most 11.5 m nats."""


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


def fusion_losses(logprobs: Tensor, rows: SparseTargets, divergence: Divergence, temperature: float) -> Tensor:
    """The fusion loss of each of P positions, differentiable; see the module's text for the formulae.

    Args:
        logprobs: (P, k) float32, the model's ln q at ``rows.ids``; anything at pads.
        rows: fused distributions; every row has an entry.
        divergence: which one.
        temperature: above 0.

    Returns:
        (P,) float32, nats.
    """
    entry = rows.ids != PAD_ID
    tail = rows.tail_mass
    if divergence == "forward-kl":
        log_q = logprobs if tail is None and temperature == 1 else _with_rest(logprobs, entry)
        log_p = _log_targets(rows, entry, least_tail=0.0)
        if temperature != 1:
            log_q, log_p = _tempered(log_q, temperature), _tempered(log_p, temperature)
        width = log_p.shape[1]
        asked = entry if tail is None else torch.cat([entry, torch.ones_like(entry[:, :1])], dim=1)
        losses = -torch.where(asked, log_p.exp() * log_q[:, :width], 0.0).sum(dim=1)
    else:
        log_p = _log_targets(rows, entry, least_tail=REST_EPSILON)
        log_q = logprobs.masked_fill(~entry, -torch.inf) if tail is None else _with_rest(logprobs, entry)
        if tail is None or temperature != 1:
            log_q, log_p = _tempered(log_q, temperature), _tempered(log_p, temperature)
        difference = torch.where(log_q > -torch.inf, log_q - log_p, 0.0)
        losses = (log_q.exp() * difference).sum(dim=1)
    return losses * temperature**2


def _with_rest(logprobs: Tensor, entry: Tensor) -> Tensor:
    """(P, k + 1): ln q of the row's ids, -inf at pads, and ln of what they leave of 1."""
    listed = logprobs.masked_fill(~entry, -torch.inf)
    return torch.cat([listed, log_rest(listed.logsumexp(dim=1, keepdim=True))], dim=1)


def _log_targets(rows: SparseTargets, entry: Tensor, *, least_tail: float) -> Tensor:
    """(P, k), or (P, k + 1) with a tail: ln p, and ln r; an entry whose probability was rounded to 0 stays finite."""
    log_p = rows.probs.clamp(min=torch.finfo(torch.float32).tiny).log().masked_fill(~entry, -torch.inf)
    if rows.tail_mass is None:
        return log_p
    return torch.cat([log_p, rows.tail_mass.clamp(min=least_tail).log()[:, None]], dim=1)


def _tempered(log_outcomes: Tensor, temperature: float) -> Tensor:
    """Logprobs of outcomes (P, m) at another temperature, normalised again."""
    scaled = log_outcomes / temperature
    return scaled - scaled.logsumexp(dim=1, keepdim=True)


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
