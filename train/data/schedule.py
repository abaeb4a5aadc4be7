"""Order of blocks and weight of gold tokens at each optimizer step, as pure functions of the step's number."""

from dataclasses import dataclass, field

import numpy as np

from train.config import TrainConfig
from train.data.blocks import epoch_order


@dataclass(frozen=True)
class Schedule:
    """Global order of blocks, cut into optimizer steps; a pure function of its four numbers.

    Every epoch sees every block once; its last step is smaller where ``batch_size`` does not divide their number.

    Attributes:
        num_blocks: number of blocks in the dataset, at least 1.
        batch_size: blocks in a step.
        num_epochs: passes over the dataset.
        seed: seed of the order.
    """

    num_blocks: int
    batch_size: int
    num_epochs: int
    seed: int
    _orders: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps in one epoch."""
        return -(-self.num_blocks // self.batch_size)

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps of the whole job."""
        return self.steps_per_epoch * self.num_epochs

    def epoch(self, step: int) -> int:
        """Return the epoch, from 0, that contains step ``step`` (from 0)."""
        return step // self.steps_per_epoch

    def blocks(self, step: int) -> np.ndarray:
        """Return the indices of the blocks of step ``step`` (from 0), read-only."""
        start = step % self.steps_per_epoch * self.batch_size
        return self._order(self.epoch(step))[start : start + self.batch_size]

    def _order(self, epoch: int) -> np.ndarray:
        """Return the order of one epoch.

        The newest one is cached, since permuting all blocks at every step is too slow.
        """
        if epoch not in self._orders:
            self._orders.clear()  # first: two orders of many blocks are not held at once
            order = epoch_order(self.num_blocks, seed=self.seed, epoch=epoch)
            order.flags.writeable = False
            self._orders[epoch] = order
        return self._orders[epoch]

    def samples_before(self, step: int) -> int:
        """Count the blocks that the steps before ``step`` saw, over all epochs."""
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        return epoch * self.num_blocks + min(in_epoch * self.batch_size, self.num_blocks)


def lambda_at(step: int, num_steps: int, config: TrainConfig) -> float:
    """Return the weight of L_CLM in optimizer step ``step`` (from 0) of ``num_steps``.

    ``linear`` goes from ``lambda`` at the first step to ``lambda_end`` at the last.
    """
    if config.lambda_end is None or num_steps == 1:
        return config.lambda_
    return config.lambda_ + (config.lambda_end - config.lambda_) * step / (num_steps - 1)
