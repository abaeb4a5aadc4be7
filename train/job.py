"""Input and output of a training job."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from stages.models.config import ModelConfig
from train.config import TrainConfig

MANIFEST: Final = "manifest.json"
"""File in a job's folder that is written last: the proof that training is done."""


@dataclass(frozen=True)
class FusedFile:
    """A file of training blocks.

    Attributes:
        path: a local path, or a URL that fsspec knows.
        sha256: of its bytes, from its manifest.
    """

    path: str
    sha256: str


@dataclass(frozen=True)
class TrainJob:
    """Everything that one training run needs; picklable.

    Attributes:
        config: the settings.
        model: the target model.
        files: the fused files, in the order of their shards.
        output: local folder of this run's checkpoints, logs, model and manifest.
        fingerprint: hash of everything that changes the result; checkpoints with another fingerprint are refused.
        sources: names of the source models.
        provenance: JSON values for the model card: models, data, and the settings and fingerprint of each stage.
        checkpoint_store: URL of a folder in an object store that committed checkpoints are copied to.
    """

    config: TrainConfig
    model: ModelConfig
    files: tuple[FusedFile, ...]
    output: str
    fingerprint: str
    sources: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    checkpoint_store: str | None = None


@dataclass(frozen=True)
class StepRecord:
    """Measurements of one optimizer step.

    Attributes:
        step: counted from 1.
        num_steps: number of steps of the whole job.
        epoch: number of the epoch, from 0.
        loss: lambda * loss_clm + (1 - lambda) * loss_fusion, nats.
        loss_clm: mean over the step's labelled positions; None if there are none.
        loss_fusion: mean over the step's positions with a fused distribution; None if there are none, or lambda is 1.
        learning_rate: learning rate of this step.
        grad_norm: before clipping.
        num_tokens: trained on so far, from the job's beginning.
        tokens_per_second: tokens per second of this step, all workers together.
        data_wait_share: share of this step's time spent waiting for its blocks to be read, mean over the workers.
        blocks: indices of the step's blocks in the dataset, in the order of the schedule, all workers together.
        lambda_: weight of loss_clm in this step.
        peak_memory_gb: most memory that a worker has held so far, 10^9 bytes: its GPU's, or the process's on a CPU.
        mfu: share of the devices' peak that the model's own operations took; None where the peak, or what the
            model computes, is not known.
    """

    step: int
    num_steps: int
    epoch: int
    loss: float
    loss_clm: float | None
    loss_fusion: float | None
    learning_rate: float
    grad_norm: float
    num_tokens: int
    tokens_per_second: float
    data_wait_share: float
    blocks: list[int]
    lambda_: float
    peak_memory_gb: float
    mfu: float | None


@dataclass(frozen=True)
class TrainResult:
    """A finished job.

    Attributes:
        model_folder: loads with ``from_pretrained``.
        fingerprint: the job's.
        num_steps: optimizer steps.
        num_tokens: tokens trained on.
        loss: loss of the last step; ``loss_clm`` and ``loss_fusion`` are its parts, None if there was none.
        was_done: the job had been finished before; nothing was computed.
    """

    model_folder: str
    fingerprint: str
    num_steps: int
    num_tokens: int
    loss: float
    loss_clm: float | None
    loss_fusion: float | None
    was_done: bool = False
