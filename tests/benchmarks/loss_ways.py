"""The training loss in two ways, each in a process of its own: ``python -m tests.benchmarks.loss_ways WAY V ROUNDS``.

``sparse`` is ``train.loss.fused_loss``. ``dense`` is what FuseLLM's and PTA-LLM's released code does, in plain PyTorch:
a dense (T, V) target for each candidate, built from its top-k rows; whole logits; the candidate with the lower
cross-entropy on the gold tokens chosen; cross-entropy under the chosen one. Two candidates, the target model's own
and one source's (the paper has two sources, hence three).

Prints one JSON object: the most memory beyond what lay there before the forward pass, and the CPU time of each round,
forward and backward.
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from train.config import TrainConfig
from train.divergence import SparseTargets
from train.loss import LossSettings, fused_loss

T, H, K = 2048, 576, 10
CANDIDATES = 2
LAMBDA = 0.8


def main(way: str, vocab_size: int, rounds: int) -> None:
    """Measure one way."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = torch.randn(T, H, requires_grad=True)
    head = nn.Linear(H, vocab_size, bias=False)
    labels = torch.randint(0, vocab_size, (T,))
    rows = [_rows(vocab_size) for _ in range(CANDIDATES)]
    peak = _extra_peak(lambda: run(way, hidden, head, labels, rows))
    seconds = []
    for _ in range(rounds):
        hidden.grad = head.weight.grad = None
        started = time.process_time()
        run(way, hidden, head, labels, rows)
        seconds.append(time.process_time() - started)
    sys.stdout.write(json.dumps({"peak_bytes": peak, "seconds": seconds}) + "\n")


def run(way: str, hidden: Tensor, head: nn.Linear, labels: Tensor, rows: list[SparseTargets]) -> None:
    """Forward and backward; the fused distribution of ``sparse`` was chosen when the data was made."""
    if way == "sparse":
        chunk = TrainConfig().chunk_positions
        settings = LossSettings(LAMBDA / T, (1 - LAMBDA) / T, chunk_positions=chunk)
        fused_loss(hidden, head, labels, rows[0], settings).total.backward()
    else:
        dense_loss(head(hidden), labels, rows).backward()


def dense_loss(logits: Tensor, labels: Tensor, rows: list[SparseTargets]) -> Tensor:
    """As released: dense targets, the better candidate by its cross-entropy on the gold tokens."""
    targets = [torch.zeros(logits.shape).scatter_(1, row.ids, row.probs) for row in rows]
    costs = [-target.gather(1, labels[:, None]).clamp(min=1e-4).log().mean() for target in targets]
    chosen = targets[int(torch.stack(costs).argmin())]
    clm = nn.functional.cross_entropy(logits, labels)
    fusion = nn.functional.cross_entropy(logits, chosen)
    return LAMBDA * clm + (1 - LAMBDA) * fusion


def _rows(vocab_size: int) -> SparseTargets:
    part = vocab_size // K
    ids = torch.randint(0, part, (T, K)) + part * torch.arange(K)  # K different ids a row
    return SparseTargets(ids, torch.softmax(torch.randn(T, K), dim=1), None)


def _extra_peak(work) -> int:
    """Bytes that the process held at most during ``work``, beyond what it held before."""
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _field(status, "VmRSS")
    work()
    return _field(status, "VmHWM") - before


def _field(status: Path, name: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
