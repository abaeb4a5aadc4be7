"""Implementations of the training loss, each in its own process: ``python -m tests.benchmarks.loss_ways WAY V DTYPE ROUNDS``.

- ``sparse`` is ``train.objective.loss.fused_loss``.
- ``dense`` builds a dense (T, V) target from each candidate's top-k rows, takes the better candidate, and computes
  cross-entropies of whole logits. This is the least work that dense targets allow.
- ``released`` chooses element by element, like the released trainers of FuseLLM and PTA-LLM: it stacks the candidates, takes
  the argmax over rewards of the same shape, and gathers.

There are three candidates, as in the paper: the target model's own distributions and those of two sources.

DTYPE is the type of the hidden states and of the head, as ``train.autocast`` sets it; losses are always computed in float32.

Prints one JSON object: the peak memory beyond what was allocated before the forward pass, and the CPU time of each round of
forward and backward passes.
"""

import json
import sys
import time

import torch
from torch import Tensor, nn

from tests.benchmarks.memory import extra_peak
from train.config import TrainConfig
from train.objective.divergence import SparseTargets
from train.objective.loss import LossSettings, fused_loss

T, H, K = 2048, 576, 10
CANDIDATES = 3
LAMBDA = 0.8


def main(way: str, vocab_size: int, dtype: torch.dtype, rounds: int) -> None:
    """Measure one implementation."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = torch.randn(T, H, dtype=dtype, requires_grad=True)
    head = nn.Linear(H, vocab_size, bias=False, dtype=dtype)
    labels = torch.randint(0, vocab_size, (T,))
    rows = [random_rows(T, vocab_size) for _ in range(CANDIDATES)]
    peak = extra_peak(lambda: run(way, hidden, head, labels, rows))
    seconds = []
    for _ in range(rounds):
        hidden.grad = head.weight.grad = None
        started = time.process_time()
        run(way, hidden, head, labels, rows)
        seconds.append(time.process_time() - started)
    sys.stdout.write(json.dumps({"peak_bytes": peak, "seconds": seconds}) + "\n")


def run(
    way: str,
    hidden: Tensor,
    head: nn.Linear,
    labels: Tensor,
    rows: list[SparseTargets],
    chunk_positions: int = TrainConfig().chunk_positions,
) -> None:
    """Run forward and backward. For ``sparse``, the candidate was already chosen when the data was made."""
    if way == "sparse":
        config, num_positions = TrainConfig(), len(labels)
        settings = LossSettings(
            LAMBDA / num_positions,
            (1 - LAMBDA) / num_positions,
            config.fusion_loss,
            config.temperature,
            chunk_positions,
        )
        fused_loss(hidden, head, labels, rows[0], settings).total.backward()
    else:
        dense_loss(head(hidden).float(), labels, rows, element_by_element=way == "released").backward()


def dense_loss(logits: Tensor, labels: Tensor, rows: list[SparseTargets], *, element_by_element: bool) -> Tensor:
    """Compute the loss with dense targets. The candidates' rewards are constants, as if computed with the data."""
    zeros = (torch.zeros(logits.shape, device=logits.device) for _ in rows)
    targets = [dense.scatter_(1, row.ids, row.probs) for dense, row in zip(zeros, rows, strict=True)]
    chosen = targets[0]
    if element_by_element:
        rewards = [
            torch.tensor(1.0 / (1 + number), dtype=torch.bfloat16, device=logits.device)
            for number in range(len(targets))
        ]
        best = torch.stack([one.expand(logits.shape) for one in rewards], dim=-1).argmax(dim=-1, keepdim=True)
        chosen = torch.stack(targets, dim=-1).gather(-1, best).squeeze(-1)
    clm = nn.functional.cross_entropy(logits, labels)
    fusion = nn.functional.cross_entropy(logits, chosen)
    return LAMBDA * clm + (1 - LAMBDA) * fusion


def random_rows(num_positions: int, vocab_size: int) -> SparseTargets:
    """Draw fused distributions of ``K`` different ids each, without a tail, on the CPU."""
    part = vocab_size // K
    ids = torch.randint(0, part, (num_positions, K)) + part * torch.arange(K)
    return SparseTargets(ids, torch.softmax(torch.randn(num_positions, K), dim=1), None)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3]), int(sys.argv[4]))
