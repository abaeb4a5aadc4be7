"""The training loss on a device: against the three products of matrices that it needs, and against dense targets."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.benchmarks import memory
from tests.benchmarks.loss_ways import CANDIDATES, random_rows, run
from tests.gpu.models import median_seconds, relative_difference
from tests.gpu.report import Report, Setup, free_memory
from train.config import TrainConfig
from train.objective.divergence import SparseTargets


class _Data:
    """Hidden states, head, labels and each candidate's rows, and the ways to their loss."""

    def __init__(self, num_positions: int, width: int, vocab_size: int, device: str) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(num_positions, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        self.head = nn.Linear(width, vocab_size, bias=False, device=device, dtype=torch.bfloat16)
        self.labels = torch.randint(0, vocab_size, (num_positions,), device=device)
        self.rows: list[SparseTargets] = [
            random_rows(num_positions, vocab_size).to(torch.device(device)) for _ in range(CANDIDATES)
        ]

    def clear(self) -> None:
        """Drop the gradients."""
        self.hidden.grad = self.head.weight.grad = None

    def run(self, way: str, chunk_positions: int) -> Callable[[], None]:
        """Return a call that computes the loss and new gradients; see ``tests.benchmarks.loss_ways``."""

        def work() -> None:
            self.clear()
            run(way, self.hidden, self.head, self.labels, self.rows, chunk_positions)

        return work

    def three_products(self) -> None:
        """Multiply as a linear layer does forward, for its input's gradient and for its own."""
        with torch.no_grad():
            logits = self.head(self.hidden)
            torch.matmul(logits, self.head.weight)
            torch.matmul(logits.t(), self.hidden)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of the states and of the head."""
        assert self.hidden.grad is not None
        assert self.head.weight.grad is not None
        return self.hidden.grad, self.head.weight.grad


def run_loss(report: Report, setup: Setup) -> None:
    """Measure time and memory of the loss, forward and backward, by vocabulary and by chunk."""
    for vocab_size in setup.size.loss_vocabularies:
        _measure(report, setup, vocab_size)
        free_memory(setup.device)


def _measure(report: Report, setup: Setup, vocab_size: int) -> None:
    size, device, name = setup.size, setup.device, f"vocabulary_{vocab_size}"
    data = _Data(size.loss_positions, size.loss_width, vocab_size, device)
    products = median_seconds(data.three_products, device, size.rounds)
    report.add_speed(f"{name}_three_products_ms", products * 1e3)
    dense_peak = _extra_peak(data, data.run("dense", 1), device)
    report.add_speed(f"{name}_dense_extra_gb", dense_peak / 1e9)
    expected = data.gradients()
    default = TrainConfig().chunk_positions
    for chunk in sorted({default, *size.loss_chunks}):
        # The default is held against the limits; the other chunks show whether a larger one would keep them.
        is_default = chunk == default
        work = data.run("sparse", chunk)
        peak = _extra_peak(data, work, device) / max(1, dense_peak)
        report.add_speed(f"{name}_chunk_{chunk}_memory_of_dense", peak, "<= 0.15" if is_default else None)
        for which, found, dense in zip(("states", "head"), data.gradients(), expected, strict=True):
            report.add(f"{name}_chunk_{chunk}_{which}_gradient", relative_difference(found, dense), "<= 3e-2")
        time = median_seconds(work, device, size.rounds) / products
        report.add_speed(f"{name}_chunk_{chunk}_time_of_products", time, "<= 1.3" if is_default else None)


def _extra_peak(data: _Data, work: Callable[[], object], device: str) -> int:
    """Return the bytes that a call holds at most beyond what was held before, its gradients included."""
    data.clear()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if memory.is_measurable():
        return memory.extra_peak(work)
    work()
    return 0
