"""The training loss in two ways, each in a process of its own: ``python -m tests.benchmarks.loss_ways WAY V DTYPE ROUNDS``.

``sparse`` is ``train.objective.loss.fused_loss``. ``dense`` has a dense (T, V) target for each candidate, built from its top-k
rows, takes the better candidate's, and computes cross-entropies of whole logits: as little as can be done with dense
targets. ``released`` chooses as FuseLLM's and PTA-LLM's released trainer does, element by element: candidates stacked,
argmax over rewards as large as they are, a gather. Candidates are three, as in the paper: the target model's own
distributions and two sources'.

DTYPE is of the hidden states and the head, as ``train.autocast`` has it; losses are computed in float32 in every way.

Prints one JSON object: the most memory beyond what lay there before the forward pass, and the CPU time of each round,
forward and backward.
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
    """Measure one way."""
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
    """Forward and backward; the fused distribution of ``sparse`` was chosen when the data was made."""
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
    """With dense targets; the candidates' rewards are given, as they are when the data was made."""
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
