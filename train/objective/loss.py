"""Training loss, computed without holding the logits or targets of the whole batch.

    L = lambda * L_CLM + (1 - lambda) * L_fusion

L_CLM is the mean over labelled positions of -ln q(gold next token), L_fusion the mean over positions that have a fused
distribution of its divergence from the model's q (``train.objective.divergence``), so a position without a fused distribution
counts only in L_CLM. Both are means over a whole optimizer step: here are the sums, weighted by what the caller gives
(lambda over the step's number of labels, ...), so that the size of a micro-batch does not change the result.

The forward pass goes through the positions chunk by chunk and computes the gradients of the hidden states and of the
head's weights on the way, for which everything is available: the backward pass only hands them on. A chunk of C positions
holds its logits and their gradient, two arrays of C x vocabulary in the precision of the head (256 x 32,000 in bfloat16:
16 MB each), and the head is applied once, not twice as with recomputation. What is computed of the logits is computed in
float32, block by block of a few positions. Of the loss only one logsumexp and the gathers at the gold and the fused ids
touch the logits; what is computed from these few numbers per position is left to autograd in float64, and its gradient is
put back: softmax times the gradient of the logsumexp, plus the gradients of the gathered logits at their places.

Where the loss asks for the rest (``divergence.asks_for_rest``), the logsumexp is that over the ids which the row does not
list, and the normaliser is put together from it and the listed logits: ln q_rest is then as accurate for a model that
leaves the rest 1e-7, or so little that float32 rounds it away, as for one that leaves it a half. Elsewhere it is the
normaliser itself.

With ``tail_loss = "gold"`` the row's entries are all that is left of its tail, and a gold token g that the row does not list
adds -ln q(g). Over the text its expectation is - sum of p(g) ln q(g) over the ids that the row does not list, p being the
distribution of the data: the cross-entropy of the whole distribution, where the bucket only asks for the right mass.

Source: the idea of the gradient in the forward pass: Hsu et al. 2024, "Liger Kernel".
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stages.contract.columns import PAD_ID
from train.objective.divergence import Divergence, SparseTargets, asks_for_rest, fusion_losses

BLOCK = 32
"""Positions whose logits are in float32 at once on a CPU: few enough to stay in a processor's cache."""
_ROWS = 2048
"""Rows of a weight's gradient that are computed at once where it is converted to another precision."""
TailLoss = Literal["bucket", "gold"]
IGNORED = -100
"""Label of a position that has no gold next token."""


class TrainableHead(Protocol):
    """Head that maps hidden states (p, H) to logits (p, V). ``split_head`` returns one, and nn.Linear is one."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """Compute the logits."""

    def modules(self) -> Iterator[nn.Module]:
        """Return all modules that the head computes with."""


@dataclass(frozen=True)
class LossSettings:
    """Weights and kind of the loss, and how many positions are computed at once.

    Attributes:
        clm_factor: weight of the sum of CLM losses: lambda over the number of labels of the whole step.
        fusion_factor: weight of the sum of fusion losses: 1 - lambda over the step's fused positions.
        divergence: divergence of the fusion loss.
        temperature: temperature of the fusion loss.
        chunk_positions: positions whose logits exist at once.
        tail_loss: ``"bucket"``: a row's tail is one outcome, the rest of the vocabulary. ``"gold"``: -ln q(gold) replaces
            the tail wherever the row does not list the gold token; only for forward KL at temperature 1.
    """

    clm_factor: float
    fusion_factor: float
    divergence: Divergence
    temperature: float
    chunk_positions: int
    tail_loss: TailLoss = "bucket"


@dataclass(frozen=True)
class LossSums:
    """Loss of several positions.

    Attributes:
        total: clm_factor * clm + fusion_factor * fusion; the one to call ``backward`` on, once.
        clm: sum over labelled positions, nats, without gradient.
        fusion: sum over positions with a fused distribution, nats, without gradient.
    """

    total: Tensor
    clm: Tensor
    fusion: Tensor


def fused_loss(
    hidden: Tensor, head: TrainableHead, labels: Tensor, targets: SparseTargets | None, settings: LossSettings
) -> LossSums:
    """Compute the loss of P positions.

    Args:
        hidden: (P, H), the body's output.
        head: its weights are read here, so that they may be gathered from shards just before.
        labels: (P,) int64, the gold next tokens; ``IGNORED`` where there is none.
        targets: fused distributions of the P positions; None: only L_CLM is computed.
        settings: weights of the two losses, divergence, chunks.

    Returns:
        The loss; where nothing is counted a zero that still has a (zero) gradient.
    """
    # Drop positions that count in neither loss: each would cost a row of logits.
    counted = labels != IGNORED  # (P,)
    if targets is not None:
        counted = counted | targets.present
        targets = targets.select(counted)
        if settings.tail_loss == "gold":
            targets = replace(targets, tail_mass=None)
    weights = [p for module in head.modules() for p in module.parameters(recurse=False) if p.requires_grad]
    weights = list({id(weight): weight for weight in weights}.values())  # a shared weight gets one gradient
    with_gradient = torch.is_grad_enabled()
    arguments = (head, labels[counted], targets, settings, with_gradient)
    return LossSums(*_ChunkedLoss.apply(hidden[counted], arguments, *weights))


class _ChunkedLoss(torch.autograd.Function):
    """Loss summed over chunks of positions; gradients are computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, arguments: tuple, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        head, labels, targets, settings, with_gradient = arguments
        # hidden (P', H), P' being the positions that count. The gradients are complete when this returns.
        gradients = _Gradients(hidden, ctx.needs_input_grad[0], weights) if with_gradient else None
        sums = hidden.new_zeros(2, dtype=torch.float32)
        for start in range(0, len(labels), settings.chunk_positions):
            chunk = slice(start, start + settings.chunk_positions)
            rows = None if targets is None else targets.select(chunk)
            sums += _chunk(hidden, chunk, head, labels[chunk], rows, settings, gradients)
        ctx.gradients = gradients
        clm, fusion = sums.unbind()
        ctx.mark_non_differentiable(clm, fusion)
        return settings.clm_factor * clm + settings.fusion_factor * fusion, clm, fusion

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Scaling is in place, so a second backward pass would scale twice.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the loss keeps its gradients for only one backward pass: compute it again for another one"
            )
        hidden = None if gradients.hidden is None else gradients.hidden.mul_(grad_total)
        weights = (
            total.mul_(grad_total).to(weight.dtype)
            for total, weight in zip(gradients.totals.values(), gradients.weights, strict=True)
        )
        return hidden, None, *weights


class _Gradients:
    """Gradients of the hidden states and of the head's weights, accumulated over chunks.

    A linear layer's gradient is added into its total by one matrix product; autograd would make an array of the weight's
    size for each chunk first. Totals are float32 where the weights are in half precision.
    """

    def __init__(self, hidden: Tensor, needs_hidden: bool, weights: Sequence[Tensor]) -> None:
        self.hidden = torch.zeros_like(hidden) if needs_hidden else None
        self.weights = weights
        self.totals = {
            id(weight): torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            for weight in weights
        }

    @contextlib.contextmanager
    def watch(self, head: TrainableHead) -> Iterator[list[tuple[nn.Linear, Tensor, Tensor]]]:
        """Collect (layer, input, output) of every call of a linear layer that is trained."""
        seen: list[tuple[nn.Linear, Tensor, Tensor]] = []

        def collect(layer: Any, inputs: tuple, output: Tensor) -> None:
            seen.append((layer, inputs[0], output))

        layers = [module for module in head.modules() if isinstance(module, nn.Linear) and module.weight.requires_grad]
        handles = [layer.register_forward_hook(collect) for layer in layers]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def add(
        self,
        chunk: slice,
        states: Tensor,
        logits: Tensor,
        grad_logits: Tensor,
        layers: Sequence[tuple[nn.Linear, Tensor, Tensor]],
    ) -> None:
        """Add the gradients of one chunk."""
        # One autograd call: down to the outputs of linear layers only, whose weights' gradients are computed below.
        linear = {id(p) for layer, _, _ in layers for p in layer.parameters(recurse=False)}
        others = [weight for weight in self.weights if id(weight) not in linear]
        wanted = [states] if self.hidden is not None else []
        wanted += [output for _, _, output in layers] + others
        grads = list(torch.autograd.grad(logits, wanted, grad_logits, allow_unused=True))
        if self.hidden is not None:
            self.hidden[chunk] = grads.pop(0)
        for layer, inputs, _ in layers:
            self._add_linear(layer, inputs.detach(), grads.pop(0))
        for weight, gradient in zip(others, grads, strict=True):
            if gradient is not None:  # a weight that this head does not use
                self.totals[id(weight)] += gradient

    def _add_linear(self, layer: nn.Linear, inputs: Tensor, gradient: Tensor) -> None:
        inputs, gradient = inputs.flatten(0, -2), gradient.flatten(0, -2)  # (C, in), (C, out)
        total = self.totals[id(layer.weight)]
        if gradient.dtype == inputs.dtype == total.dtype:
            total.addmm_(gradient.t(), inputs)
        else:
            # Half precision: the product in it, as autograd does, the sum in float32. A few rows at once stay in the cache.
            inputs = inputs.to(gradient.dtype)
            for rows, columns in zip(total.split(_ROWS), gradient.split(_ROWS, dim=1), strict=True):
                rows.add_(columns.t() @ inputs)
        if layer.bias is not None and layer.bias.requires_grad:
            self.totals[id(layer.bias)] += gradient.sum(dim=0)


def _chunk(
    hidden: Tensor,
    chunk: slice,
    head: TrainableHead,
    labels: Tensor,
    targets: SparseTargets | None,
    settings: LossSettings,
    gradients: _Gradients | None,
) -> Tensor:
    """Compute the two sums of one chunk, (2,) float32, and add its gradients to ``gradients``."""
    states = hidden[chunk].detach()  # (C, H): a separate graph, which ends here
    asked = targets is not None and asks_for_rest(targets, settings.divergence, settings.temperature)
    left_out = targets.ids if targets is not None and asked else None
    if gradients is None:
        with torch.no_grad():
            needed = _needed_of(head(states), labels, targets, left_out)
            return _loss_of(needed, labels, targets, settings, with_rest=asked)[1]
    # 1. Apply the head, with a graph from the logits back to states and weights.
    with torch.enable_grad(), gradients.watch(head) as layers:
        logits = head(states.requires_grad_(gradients.hidden is not None))  # (C, V)
    # 2. Compute the loss of a few numbers per position, with a second graph that does not contain the logits.
    needed = [tensor.requires_grad_() for tensor in _needed_of(logits.detach(), labels, targets, left_out)]
    with torch.enable_grad():
        total, sums = _loss_of(needed, labels, targets, settings, with_rest=asked)
    # 3. Join the two graphs by hand: gradient of those numbers -> gradient of the logits -> states and weights.
    if logits.requires_grad:
        of_needed = [gradient.float() for gradient in torch.autograd.grad(total, needed)]
        others = needed[0].detach().float()
        of_logits = _of_logits(logits.detach(), others, of_needed, labels, targets, left_out)
        gradients.add(chunk, states, logits, of_logits, layers)
    return sums


def _needed_of(logits: Tensor, labels: Tensor, targets: SparseTargets | None, left_out: Tensor | None) -> list[Tensor]:
    """Compute what the loss needs of the logits (C, V), in float64.

    Args:
        logits: logits in the precision of the head.
        labels: (C,).
        targets: targets of the C positions.
        left_out: (C, k) ids over which the first result is not taken, ``PAD_ID`` where there are fewer.

    Returns:
        ln sum exp (C,) of the logits that are not left out, -inf where there are none; the gold logits (C,); and, if there
        are targets, those of the fused ids (C, k).
    """
    sums = []
    size = block_positions(logits.device.type, len(logits))
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        block = _others(logits[rows], None if left_out is None else left_out[rows])
        # Clamped, since -inf - -inf would be NaN where every id is left out.
        largest = block.amax(dim=1).clamp_(min=torch.finfo(torch.float32).min)
        sums.append(block.sub_(largest[:, None]).exp_().sum(dim=1).double().log_().add_(largest))
    # Pads and ignored labels read id 0 here; the loss masks them.
    needed = [torch.cat(sums), logits.gather(1, labels.clamp(min=0)[:, None]).squeeze(1).double()]
    if targets is not None:
        needed.append(logits.gather(1, targets.ids.clamp(min=0)).double())
    return needed


def block_positions(device: str, chunk: int) -> int:
    """Return the positions of a chunk whose logits are in float32 at once.

    On a GPU all of them: it has no use for small blocks, whose many small kernels take longer to start than to run.

    Args:
        device: its type, ``"cpu"`` or ``"cuda"``.
        chunk: positions of the chunk, at least 1.
    """
    return min(BLOCK, chunk) if device == "cpu" else chunk


def _others(logits: Tensor, left_out: Tensor | None) -> Tensor:
    """Copy the logits of a block in float32, with -inf at the ids that are left out."""
    block = logits.to(torch.float32, copy=True)
    if left_out is not None:
        nothing = torch.where(left_out == PAD_ID, 0.0, -torch.inf)  # a pad adds 0 to id 0
        block.scatter_add_(1, left_out.clamp(min=0), nothing)
    return block


def _of_logits(
    logits: Tensor,
    others: Tensor,
    of_needed: Sequence[Tensor],
    labels: Tensor,
    targets: SparseTargets | None,
    left_out: Tensor | None,
) -> Tensor:
    """Compute the gradient of the logits (C, V), in their precision, from that of ``_needed_of``'s results."""
    of_others, of_gold, *of_listed = of_needed  # (C,), (C,), [(C, k)]
    others = others.clamp(min=torch.finfo(torch.float32).min)
    result = torch.empty_like(logits)
    size = block_positions(logits.device.type, len(logits))
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        block = _others(logits[rows], None if left_out is None else left_out[rows])
        # The gradient of a logsumexp is the softmax; ids that are left out are at -inf, hence get 0.
        block.sub_(others[rows, None]).exp_().mul_(of_others[rows, None])
        block.scatter_add_(1, labels[rows].clamp(min=0)[:, None], of_gold[rows, None])
        if targets is not None:
            block.scatter_add_(1, targets.ids[rows].clamp(min=0), of_listed[0][rows])  # a pad adds 0 to id 0
        result[rows] = block
    return result


def _loss_of(
    needed: Sequence[Tensor],
    labels: Tensor,
    targets: SparseTargets | None,
    settings: LossSettings,
    *,
    with_rest: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the weighted loss of a chunk, and its two sums (2,) float32 without gradient."""
    others, gold, *listed = needed
    normaliser = others
    # (C, k + 1): with the rest as one more outcome, the logsumexp over all outcomes is the normaliser.
    if targets is not None and with_rest:
        listed = [torch.cat([listed[0].masked_fill(targets.ids == PAD_ID, -torch.inf), others[:, None]], dim=1)]
        normaliser = listed[0].logsumexp(dim=1)
    clm = torch.where(labels != IGNORED, normaliser - gold, 0.0).sum()
    fusion = torch.zeros_like(clm)
    if targets is not None:
        # Positions without a fused distribution count only in L_CLM.
        present = targets.present
        logprobs = (listed[0] - normaliser[:, None])[present]
        rows = targets.select(present)
        fusion = fusion_losses(logprobs, rows, settings.divergence, settings.temperature).sum()
        if settings.tail_loss == "gold":
            is_listed = (targets.ids == labels[:, None]).any(dim=1)
            is_outside = present & (labels != IGNORED) & ~is_listed
            fusion = fusion + torch.where(is_outside, normaliser - gold, 0.0).sum()
    total = settings.clm_factor * clm + settings.fusion_factor * fusion
    return total, torch.stack([clm.detach(), fusion.detach()]).float()
