"""Top-k logprobs of hidden states, and tokens drawn from the rest, a chunk of positions at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from stages.models.batches import NO_GOLD

_BLOCKS: Final = (256, 16)
"""Block widths of ``stable_topk``. Measured on one core of a busy machine, float32, k = 10, against a whole ``torch.topk``
(which promises nothing about ties): (512, 32,000) 23 and 17 ms; (256, 151,936) 20 and 28 ms; (128, 262,144) 15 and 23 ms.
With (512, 64, 16) the first is 37 ms and 57 MB of gathered columns instead of 29, the others are equal."""

_CACHED_LOGITS: Final = 2**20
"""Logits that a CPU takes the largest of at a time: their float32 copy stays in its cache, and in memory that the process
has. Measured on one core, (256, 49,152) bfloat16: 21 ms instead of 47 ms in one piece; (256, 151,936): 58 and 134 ms."""

DRAW_BLOCK: Final = 128
"""Ids of a block. A draw chooses a block by the blocks' sums, then an id by only the entries of that block, so that sums in
float64, which draws of small probabilities need, are over vocabulary / 128 + 128 numbers and not over the vocabulary."""
_DRAWS_AT_ONCE: Final = 16
"""Draws of a position whose blocks are gathered at once: 16 x 128 numbers, fewer than there are logits."""


@dataclass(frozen=True)
class TopK:
    """Part of P distributions over a vocabulary that is kept.

    Attributes:
        ids: (P, k) int64; descending probability, equal ones in ascending order of id.
        logprobs: (P, k) float32, natural logs.
        gold_logprob: (P,) float32; NaN where there is no gold token.
        sample_ids: (P, m) int64, ascending, tokens drawn from the other ids in proportion to their probability; -1 where no
            other id has any.
    """

    ids: Tensor
    logprobs: Tensor
    gold_logprob: Tensor
    sample_ids: Tensor


def topk_logprobs(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    gold_ids: Tensor,
    *,
    top_k: int,
    num_valid: int,
    chunk_positions: int,
    uniforms: Tensor | None = None,
) -> TopK:
    """Apply the LM head to hidden states and keep each position's largest logprobs, and draws from the rest.

    Logprobs are normalised only over ids below ``num_valid``. A model whose embedding is padded to a round number has
    rows that no token has; the mass that training left them is not the probability of any text, and a tail mass that counted it
    would be taken for other tokens'. So they are cut off before the normalisation, as if their logits were -inf.

    Only chunk_positions x vocabulary logits exist at once, in the head's own type; in float32, in which the logarithms are
    taken, as many on a GPU and a cache of them on a CPU.

    Args:
        hidden: (P, H), the body's last hidden states.
        head: (C, H) -> (C, vocabulary) logits, with all that the model does to them (bias, scale, soft cap); what it
            returns may be overwritten.
        gold_ids: (P,) int64, the next token; ``NO_GOLD`` where there is none.
        top_k: entries kept; all ``num_valid`` if there are fewer.
        num_valid: the tokenizer's length.
        chunk_positions: positions whose logits exist at once.
        uniforms: (P, m) float64 in [0, 1], ascending: where in the cumulated rest each draw lies. None: nothing is drawn.
    """
    if uniforms is None:
        uniforms = gold_ids.new_empty((len(gold_ids), 0), dtype=torch.float64)
    chunks = []
    pieces = (tensor.split(chunk_positions) for tensor in (hidden, gold_ids, uniforms))
    for states, gold, chosen in zip(*pieces, strict=True):
        logits = head(states)
        rows = len(states) if logits.is_cuda else max(1, _CACHED_LOGITS // num_valid)
        chunks += [
            _chunk_topk(*few, top_k=top_k, num_valid=num_valid)
            for few in zip(logits.split(rows), gold.split(rows), chosen.split(rows), strict=True)
        ]
    return TopK(
        ids=torch.cat([chunk.ids for chunk in chunks]),
        logprobs=torch.cat([chunk.logprobs for chunk in chunks]),
        gold_logprob=torch.cat([chunk.gold_logprob for chunk in chunks]),
        sample_ids=torch.cat([chunk.sample_ids for chunk in chunks]),
    )


def _chunk_topk(logits: Tensor, gold_ids: Tensor, uniforms: Tensor, *, top_k: int, num_valid: int) -> TopK:
    logits = logits[:, :num_valid].float()
    values, ids = stable_topk(logits, top_k)
    gold = logits.gather(1, gold_ids.clamp(min=0)[:, None])[:, 0]
    largest = values[:, :1]
    # In place: torch.logsumexp would hold a second tensor of this size, and the logits are not needed any more.
    exps = logits.sub_(largest).exp_()
    log_total = exps.sum(dim=1).log() + largest[:, 0]
    missing = gold.new_full((), torch.nan)
    return TopK(
        ids=ids,
        logprobs=values - log_total[:, None],
        gold_logprob=torch.where(gold_ids == NO_GOLD, missing, gold - log_total),
        # In place again: the largest are not to be drawn, and nothing else is needed of them.
        sample_ids=draw(exps.scatter_(1, ids, 0.0), uniforms) if uniforms.shape[1] else ids[:, :0],
    )


def draw(mass: Tensor, uniforms: Tensor) -> Tensor:
    """Draw ids in proportion to their mass, by inversion of the cumulated mass in the order of the ids.

    Args:
        mass: (P, V) float32 >= 0.
        uniforms: (P, m) float64 in [0, 1], ascending.

    Returns:
        (P, m) int64, ascending; never an id without mass, and -1 at the positions where no id has any.
    """
    num_ids = mass.shape[1]
    num_whole = num_ids // DRAW_BLOCK
    whole, rest = mass[:, : num_whole * DRAW_BLOCK], mass[:, num_whole * DRAW_BLOCK :]
    sums = whole.unflatten(1, (num_whole, DRAW_BLOCK)).sum(dim=2)
    if rest.shape[1]:
        sums = torch.cat([sums, rest.sum(dim=1, keepdim=True)], dim=1)
    blocks, inside = _invert(sums, uniforms)
    places = torch.arange(DRAW_BLOCK, device=mass.device)
    drawn = []
    for few, shares in zip(blocks.split(_DRAWS_AT_ONCE, 1), inside.split(_DRAWS_AT_ONCE, 1), strict=True):
        columns = few[:, :, None] * DRAW_BLOCK + places
        entries = mass.gather(1, columns.clamp(max=num_ids - 1).flatten(1)).view(columns.shape)
        entries = entries.masked_fill(columns >= num_ids, 0.0)  # behind the vocabulary's end
        place, _ = _invert(entries.flatten(0, 1), shares.flatten()[:, None])
        drawn.append(few * DRAW_BLOCK + place.view(few.shape))
    return torch.cat(drawn, dim=1).masked_fill(sums.amax(dim=1, keepdim=True) <= 0, -1)


def _invert(mass: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Find the entries in which given shares of a row's mass lie.

    Args:
        mass: (P, n) >= 0.
        shares: (P, m) float64 in [0, 1].

    Returns:
        index: (P, m) int64, of entries with mass; any index where the row has none.
        inside: (P, m) float64 in [0, 1]; the share of the entry's own mass that lies before.
    """
    ends = mass.double().cumsum(dim=1)
    # An entry without mass ends where the one before it does. A parallel sum need not give both the same last digit, and
    # such an entry must not be found: so the ends are only those of entries with mass.
    ends = ends.masked_fill(mass <= 0, 0.0).cummax(dim=1).values
    total = ends[:, -1:]
    # A share of 1, or one that rounding makes 1, lies in the last entry with mass.
    wanted = torch.minimum(shares * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(ends, wanted, right=True).clamp_(max=mass.shape[1] - 1)
    end = ends.gather(1, index)
    start = torch.where(index > 0, ends.gather(1, (index - 1).clamp(min=0)), 0.0)
    return index, ((wanted - start) / (end - start)).clamp(0.0, 1.0)


def stable_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest entries of each row, descending; of equal entries the one with the lower index comes first.

    Half-precision logits are often equal, also across the k-th place, where ``torch.topk`` takes any of them.

    The row is cut into blocks; the k first entries of this order lie in the k blocks whose own first entries come first
    (by their maximum, equal ones by position), so the rest is dropped before anything is sorted.

    Args:
        values: (P, V) float; NaN counts as the largest.
        k: all V entries if V is smaller.

    Returns:
        values (P, k) and indices (P, k) int64.
    """
    indices = torch.arange(values.shape[1], device=values.device).expand(values.shape)
    for width in _BLOCKS:
        if values.shape[1] // width > k:
            values, indices = _best_blocks(values, indices, k, width)
    ordered, order = values.sort(dim=1, descending=True, stable=True)
    return ordered[:, :k], indices.gather(1, order[:, :k])


def _best_blocks(values: Tensor, indices: Tensor, k: int, width: int) -> tuple[Tensor, Tensor]:
    """Keep each row's k best blocks of ``width`` columns, in their order, and the columns behind the last whole block."""
    num_blocks = values.shape[1] // width
    whole = num_blocks * width
    maxima = values[:, :whole].unflatten(1, (num_blocks, width)).amax(dim=2)
    best = maxima.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    inside = torch.arange(width, device=values.device)
    columns = (best[:, :, None] * width + inside).flatten(1)
    rest = torch.arange(whole, values.shape[1], device=values.device).expand(len(values), -1)
    columns = torch.cat([columns, rest], dim=1)
    return values.gather(1, columns), indices.gather(1, columns)
