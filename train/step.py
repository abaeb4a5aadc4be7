"""One optimizer step over all workers."""

import math
import time
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stages.models.devices import peak_memory_bytes
from train.config import TrainConfig
from train.data.blocks import MicroBatch
from train.data.feed import Feed, StepBatch
from train.data.schedule import Schedule, lambda_at
from train.distributed import Workers
from train.job import StepRecord
from train.model.flops import ModelFlops, peak_flops
from train.model.parallel import LossModel
from train.optimizer import learning_rate


class Stepper:
    """Sharded model and optimizer that turn batches into optimizer steps.

    Losses and gradients are those of the whole step: each worker's sums are divided by the counts over all workers, and
    the gradients are summed. So neither the number of workers nor the size of a micro-batch changes them.
    """

    def __init__(
        self,
        config: TrainConfig,
        root: LossModel,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        workers: Workers,
    ) -> None:
        """Prepare to step. All workers do so, with the same settings."""
        self._config = config
        self._root = root
        self._optimizer = optimizer
        self._schedule = schedule
        self._workers = workers
        self._flops = ModelFlops.of(root.model)
        self._peak = peak_flops(config, workers.device)

    def step(self, feed: Feed, *, tokens_before: int) -> StepRecord:
        """Train on the feed's next batch.

        Args:
            feed: feed of this worker.
            tokens_before: number of tokens trained on before this step.

        Raises:
            FloatingPointError: a loss or the gradient is not finite. Every worker raises it and names the blocks; the weights
                stay as they were before the step.
        """
        # 1. Take the batch, and fix everything that depends on the step's number.
        started = time.perf_counter()
        batch, waited = feed.next()
        rate = learning_rate(batch.step, self._schedule.num_steps, self._config)
        lambda_ = lambda_at(batch.step, self._schedule.num_steps, self._config)
        # Seeded by step and rank, so that dropout (where a model has it) is the same after a restart.
        torch.manual_seed((self._config.seed * 1_000_003 + batch.step) * self._workers.size + self._workers.rank)
        # 2. Normalise by the counts of all workers: the mean is over the whole step, not over one worker's micro-batch.
        counts = self._workers.sum([batch.num_labels, batch.num_fused, batch.num_tokens])
        num_labels, num_fused, num_tokens = (int(count) for count in counts)
        clm_factor = lambda_ / num_labels if num_labels else 0.0
        fusion_factor = (1 - lambda_) / num_fused if num_fused else 0.0
        # 3. Accumulate the gradient and update the weights. Blocks of one token each have nothing to predict.
        clm = fusion = norm = 0.0
        if num_labels + num_fused:
            clm, fusion = self._gradients(batch, clm_factor, fusion_factor)
            norm = self._apply(batch, rate)
        # 4. Describe the step. These are collective operations too, so every worker builds the record.
        waited = self._workers.sum([waited])[0] / self._workers.size
        seconds = time.perf_counter() - started
        return StepRecord(
            step=batch.step + 1,
            num_steps=self._schedule.num_steps,
            epoch=self._schedule.epoch(batch.step),
            loss=clm_factor * clm + fusion_factor * fusion,
            loss_clm=clm / num_labels if num_labels else None,
            loss_fusion=fusion / num_fused if num_fused else None,
            learning_rate=rate,
            grad_norm=norm,
            num_tokens=tokens_before + num_tokens,
            tokens_per_second=num_tokens / seconds,
            data_wait_share=waited / seconds,
            blocks=list(batch.blocks),
            lambda_=lambda_,
            peak_memory_gb=self._workers.max_float(peak_memory_bytes(self._workers.device) / 1e9),
            mfu=self._mfu(num_tokens, len(batch.blocks), seconds),
        )

    def _mfu(self, num_tokens: int, num_blocks: int, seconds: float) -> float | None:
        """Divide the model's operations by what all devices could have done; None if either is unknown."""
        if self._peak is None or self._flops is None:
            return None
        return self._flops.of_tokens(num_tokens, num_blocks) / (seconds * self._peak * self._workers.size)

    def _gradients(self, batch: StepBatch, clm_factor: float, fusion_factor: float) -> tuple[float, float]:
        """Accumulate the gradient; return the sums of the two losses over all workers."""
        self._optimizer.zero_grad(set_to_none=True)
        sums = torch.stack(
            [self._backward(micro_batch, clm_factor, fusion_factor) for micro_batch in batch.micro_batches]
        )
        clm, fusion = self._workers.sum(sums.double().sum(dim=0).tolist())
        # The sums are the same on every worker, so all of them raise, and none waits in a collective for the others.
        if not math.isfinite(clm + fusion):
            finite = sums.isfinite().all(dim=1).tolist()
            bad = [name for names, fine in zip(batch.names, finite, strict=True) if not fine for name in names]
            blocks = [name for names in self._workers.gather(bad) for name in names]
            raise FloatingPointError(
                f"step {batch.step + 1}: the loss is not finite (sums: CLM {clm}, fusion {fusion}) on blocks "
                f"{', '.join(blocks)}; the last checkpoint is intact"
            )
        return clm, fusion

    def _backward(self, micro_batch: MicroBatch, clm_factor: float, fusion_factor: float) -> Tensor:
        """Run one forward and backward pass; return the two sums, (2,) float32, without waiting for the device."""
        total, clm, fusion = self._root(
            micro_batch.to(self._workers.device), clm_factor=clm_factor, fusion_factor=fusion_factor
        )
        total.backward()
        return torch.stack([clm, fusion])

    def _apply(self, batch: StepBatch, rate: float) -> float:
        """Clip the gradient and update the weights; return the gradient's norm before clipping."""
        # Without gradient: frozen weights, and weights that the architecture does not use.
        parameters = [parameter for parameter in self._root.parameters() if parameter.grad is not None]
        norm = total_norm(parameters)
        if not math.isfinite(norm):
            blocks = [
                name for names in self._workers.gather(batch.names) for block_names in names for name in block_names
            ]
            raise FloatingPointError(
                f"step {batch.step + 1}: the gradient's norm is {norm} on blocks {', '.join(blocks)}; the last "
                "checkpoint is intact"
            )
        torch.nn.utils.clip_grads_with_norm_(parameters, self._config.clip_norm, torch.tensor(norm))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        return norm


def total_norm(parameters: list[nn.Parameter]) -> float:
    """Compute the 2-norm of the whole gradient, over all parameters and all workers' shards."""
    norm = torch.nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in parameters])
    # The norm of sharded gradients is a DTensor with one partial sum per worker; full_tensor reduces it.
    return float(cast(Any, norm).full_tensor() if isinstance(norm, DTensor) else norm)
