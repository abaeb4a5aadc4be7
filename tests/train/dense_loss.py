"""The losses with dense logits and dense targets, written as their definitions read: the oracle; and plain settings."""

import torch

from stages.contract.columns import PAD_ID
from train.objective.divergence import Divergence, SparseTargets
from train.objective.loss import IGNORED, LossSettings, TailLoss


def loss_settings(
    clm_factor: float,
    fusion_factor: float,
    divergence: Divergence = "forward-kl",
    temperature: float = 1.0,
    chunk_positions: int = 128,
    tail_loss: TailLoss = "bucket",
) -> LossSettings:
    """The paper's loss, but for what is given."""
    return LossSettings(clm_factor, fusion_factor, divergence, temperature, chunk_positions, tail_loss)


def dense_sums(
    logits: torch.Tensor, labels: torch.Tensor, targets: SparseTargets, divergence: str, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the CLM loss and of the fusion loss over the positions; logits (P, V)."""
    logprobs = logits.log_softmax(dim=1)
    clm, fusion = logits.new_zeros(()), logits.new_zeros(())
    for row, label in enumerate(labels.tolist()):
        if label != IGNORED:
            clm = clm - logprobs[row, label]
        listed = {
            token: prob
            for token, prob in zip(targets.ids[row].tolist(), targets.probs[row].tolist(), strict=True)
            if token != PAD_ID
        }
        if listed:
            tail = None if targets.tail_mass is None else targets.tail_mass[row].item()
            fusion = fusion + row_loss(logprobs[row], listed, tail, divergence, temperature)
    return clm, fusion


def row_loss(
    logprobs: torch.Tensor, listed: dict[int, float], tail: float | None, divergence: str, temperature: float
) -> torch.Tensor:
    """Return one position: outcomes are the listed ids and the rest of the vocabulary."""
    q = logprobs.exp()
    outside = torch.ones(len(logprobs), dtype=torch.bool)
    outside[list(listed)] = False
    model = torch.cat([q[list(listed)], q[outside].sum()[None]])
    fused = torch.tensor([*listed.values(), 0.0 if tail is None else tail], dtype=torch.float64)
    if divergence == "reverse-kl" and tail is None:
        model, fused = model[:-1], fused[:-1]
        model = model / model.sum()
    if temperature != 1:
        model, fused = model ** (1 / temperature), fused ** (1 / temperature)
        model, fused = model / model.sum(), fused / fused.sum()
    if divergence == "forward-kl":
        return -(fused * model.log()).sum() * temperature**2
    return (model * (model.log() - fused.log())).sum() * temperature**2
