"""Fusion loss of one position: the divergence of the model's distribution from a sparse fused one.

A fused row lists n ids with probabilities p and may have a tail bucket, the mass r that its sources left outside the
ids (``tail_mass``); a row without a tail was rescaled to sum to 1. The model's logprobs ln q come over the whole
vocabulary; q_rest, the sum of q over the other ids of the vocabulary, is the mass that the model itself leaves outside
the row's. So both are compared over n + 1 outcomes, the ids and "the rest":

- ``forward-kl``, the paper's cross-entropy, which is KL(fused || model) up to a constant:

      - sum_i p_i ln q_i  -  r ln q_rest

  A row without a tail has r = 0: it asks the model to leave nothing outside the ids.

- ``reverse-kl``, KL(model || fused):

      sum_i q_i (ln q_i - ln p_i)  +  q_rest (ln q_rest - ln r)

  A row without a tail would make any mass outside its ids infinitely wrong. But it was rescaled because the mass
  outside is not known, so it is taken as what it is, a distribution *given that the next token is among the ids*, and
  the model is compared under the same condition, q'_i = q_i / sum_j q_j:

      sum_i q'_i (ln q'_i - ln p_i)

  It says nothing about the mass outside, and a row of one id says nothing at all. r is at least ``LEAST_TAIL``.

ln q_rest is the logsumexp over the other ids' logits, less the normaliser: 1 - sum over the row's ids of q would be
rounding where the model is sure of them, and it is such a model that the tail is to correct. Its loss r ln q_rest has no
bound, as that of any id has none. A row that lists the whole vocabulary has no rest, and its tail counts nothing.

A temperature t divides the log-probabilities of the outcomes of *both* sides, ln q and ln p, which are normalised
again, and the loss is multiplied by t^2, so that gradients keep their size (Hinton et al. 2015). The rest is one
outcome: how either side spreads its mass within the rest does not count at any temperature. So the loss is least
where q agrees with p on the ids and on the rest, whatever t is; with ``softmax(logits / t)`` over the whole vocabulary
it would not be, since a row's tail says nothing about a softened tail. t = 1 changes nothing.

Source: PTA-LLM, equation of the training objective; the tail, the reverse divergence and the temperature are ours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stages.contract.columns import PAD_ID

Divergence = Literal["forward-kl", "reverse-kl"]

LEAST_TAIL = 1e-5
"""Least tail mass r under ``reverse-kl``: tails are rounded, and one of 0 would make any rest infinitely wrong."""


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
        """Return the rows at ``index``, a mask or a range."""
        return SparseTargets(
            self.ids[index], self.probs[index], None if self.tail_mass is None else self.tail_mass[index]
        )

    def to(self, device: torch.device) -> "SparseTargets":
        """Copy to a device; copies from pinned memory are asynchronous."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "SparseTargets":
        """Copy to pinned memory, from which a GPU copies while the CPU continues."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "SparseTargets":
        tail_mass = None if self.tail_mass is None else function(self.tail_mass)
        return SparseTargets(function(self.ids), function(self.probs), tail_mass)

    @property
    def present(self) -> Tensor:
        """Whether each position has a fused distribution, (P,) bool."""
        return (self.ids != PAD_ID).any(dim=1)


def asks_for_rest(rows: SparseTargets, divergence: Divergence, temperature: float) -> bool:
    """Return whether the fusion loss of such rows depends on the mass that the model leaves outside their ids."""
    return rows.tail_mass is not None or (divergence == "forward-kl" and temperature != 1)


def fusion_losses(logprobs: Tensor, rows: SparseTargets, divergence: Divergence, temperature: float) -> Tensor:
    """Compute the fusion loss of each of P positions, differentiable; see the module's text for the formulae.

    Args:
        logprobs: (P, k), the model's ln q at ``rows.ids``, anything at pads; (P, k + 1) where ``asks_for_rest``: in the last
            column ln q_rest, -inf where the ids are the whole vocabulary.
        rows: fused distributions; every row has an entry.
        divergence: name of the divergence.
        temperature: above 0.

    Returns:
        (P,), nats, in the precision of ``logprobs``.
    """
    # 1. Lay out the outcomes: (P, k) ids, or (P, k + 1) with the rest in the last column.
    outcome = rows.ids != PAD_ID
    if asks_for_rest(rows, divergence, temperature):
        outcome = torch.cat([outcome, logprobs[:, -1:] > -torch.inf], dim=1)
    log_q = logprobs.masked_fill(~outcome, -torch.inf)
    log_p = _log_targets(rows, log_q.dtype, least_tail=LEAST_TAIL if divergence == "reverse-kl" else 0.0)
    # Forward KL at a temperature asks for the rest of q even if p has no tail, so log_p may be narrower than log_q.
    width = log_p.shape[1]
    log_p = log_p.masked_fill(~outcome[:, :width], -torch.inf)
    # 2. Renormalise: at a temperature both sides; under reverse KL without a tail q, given that the token is among the ids.
    if temperature != 1 or (divergence == "reverse-kl" and rows.tail_mass is None):
        log_q, log_p = _tempered(log_q, temperature), _tempered(log_p, temperature)
    # 3. Sum over outcomes. ``where`` keeps 0 * -inf, at pads, from becoming NaN in the loss and in its gradient.
    if divergence == "forward-kl":
        losses = -torch.where(outcome[:, :width], log_p.exp() * log_q[:, :width], 0.0).sum(dim=1)
    else:
        losses = (log_q.exp() * torch.where(log_q > -torch.inf, log_q - log_p, 0.0)).sum(dim=1)
    return losses * temperature**2


def _log_targets(rows: SparseTargets, dtype: torch.dtype, *, least_tail: float) -> Tensor:
    """Compute ln p, (P, k), followed by ln r in column k if there is a tail.

    A probability rounded to 0 stays finite.
    """
    log_p = rows.probs.to(dtype).clamp(min=torch.finfo(torch.float32).tiny).log()
    if rows.tail_mass is None:
        return log_p
    return torch.cat([log_p, rows.tail_mass.to(dtype).clamp(min=least_tail).log()[:, None]], dim=1)


def _tempered(log_outcomes: Tensor, temperature: float) -> Tensor:
    """Renormalise logprobs of outcomes, (P, m), at another temperature."""
    scaled = log_outcomes / temperature
    return scaled - scaled.logsumexp(dim=1, keepdim=True)
