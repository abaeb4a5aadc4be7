"""Arithmetic of ``ptafuse plan``: from sizes and rates to GPU-hours, core-hours, bytes and money. Reads nothing."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.settings.planning import AssumptionsConfig, PricesConfig
from pipeline.settings.run import RunConfig

HOUR_SECONDS = 3600.0
WEIGHT_BYTES = 4
"""Bytes per parameter in a trained model: float32."""
CHECKPOINT_BYTES = 12
"""Bytes per parameter in a checkpoint: float32 weights and AdamW's two moments."""


@dataclass(frozen=True)
class Cost:
    """Computing time, in GPU-hours and core-hours.

    Attributes:
        gpu_hours: GPU-hours.
        core_hours: hours of CPU cores of workers without a GPU; the price of a GPU includes its worker's cores.
    """

    gpu_hours: float = 0.0
    core_hours: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.gpu_hours + other.gpu_hours, self.core_hours + other.core_hours)

    def __mul__(self, factor: float) -> "Cost":
        return Cost(self.gpu_hours * factor, self.core_hours * factor)

    def price(self, prices: PricesConfig) -> float | None:
        """Return the cost in the prices' currency; None if something that is needed has no price."""
        priced_hours = ((self.gpu_hours, prices.gpu_hour), (self.core_hours, prices.core_hour))
        needed = [(hours, price) for hours, price in priced_hours if hours]
        if any(price is None for _, price in needed):
            return None
        return sum(hours * price for hours, price in needed if price is not None)


@dataclass
class Assumed:
    """Assumptions, together with a record of which ones were used."""

    values: AssumptionsConfig
    used: set[str] = field(default_factory=set)

    def take(self, name: str) -> float:
        """Return one assumption, and record that it was used, so that it is printed."""
        self.used.add(name)
        return float(getattr(self.values, name))


@dataclass(frozen=True)
class Sizes:
    """Amount of text of a run.

    Attributes:
        num_documents: None: not known before shard has run.
        text_bytes: size of all documents, held-out ones included.
        tokens: model -> tokens of that text under its tokenizer.
        source: origin of these figures.
    """

    num_documents: int | None
    text_bytes: float
    tokens: dict[str, float]
    source: str


def cost_of(seconds: float, *, cpus: float, gpus: float) -> Cost:
    """Compute the cost of workers that computed for the given number of seconds in total."""
    hours = seconds / HOUR_SECONDS
    return Cost(gpu_hours=hours * gpus) if gpus else Cost(core_hours=hours * cpus)


def shard_cost(tokens: Iterable[float], assumed: Assumed) -> Cost:
    """Estimate the cost of tokenizing a text with each of several tokenizers.

    Args:
        tokens: number of tokens of the text under each tokenizer.
        assumed: the rates.
    """
    return cost_of(sum(tokens) / assumed.take("shard_rate"), cpus=1.0, gpus=0.0)


def forward_cost(tokens: float, parameters: float, *, gpu: bool, eager: bool = False, assumed: Assumed) -> Cost:
    """Estimate the cost of a model's forward pass over a text: logits, and evaluation.

    Args:
        tokens: number of tokens of the text.
        parameters: number of parameters of the model.
        gpu: it runs on GPUs.
        eager: its architecture has neither SDPA nor FlashAttention.
        assumed: the rates.
    """
    rate = assumed.take("gpu_forward_rate" if gpu else "cpu_forward_rate")
    if gpu and eager:
        rate /= assumed.take("eager_slowdown")
    return cost_of(tokens * parameters / rate, cpus=1.0, gpus=float(gpu))


def align_cost(tokens: float, config: RunConfig, assumed: Assumed) -> Cost:
    """Estimate the cost of aligning one source."""
    name = "align_boundary_rate" if config.align.pairing == "boundary" else "align_rate"
    return cost_of(tokens / assumed.take(name), cpus=1.0, gpus=0.0)


def fuse_cost(tokens: float, assumed: Assumed) -> Cost:
    """Estimate the cost of fusing all sources."""
    return cost_of(tokens / assumed.take("fuse_rate"), cpus=1.0, gpus=0.0)


def train_cost(
    tokens: float, parameters: float, *, gpu: bool, checkpointing: bool, eager: bool = False, assumed: Assumed
) -> Cost:
    """Estimate the cost of training on a number of tokens.

    Args:
        tokens: number of tokens over all epochs.
        parameters: number of parameters of the target model.
        gpu: train on GPUs.
        checkpointing: activations are computed twice: 8 operations per token and parameter instead of 6.
        eager: the architecture has neither SDPA nor FlashAttention.
        assumed: the rates.
    """
    rate = assumed.take("gpu_train_rate" if gpu else "cpu_train_rate") * (6 / 8 if checkpointing else 1.0)
    if gpu and eager:
        rate /= assumed.take("eager_slowdown")
    return cost_of(tokens * parameters / rate, cpus=1.0, gpus=float(gpu))


def shard_bytes(text_bytes: float, assumed: Assumed) -> float:
    """Estimate the size of the shard stage's output, in bytes."""
    return text_bytes * assumed.take("text_compression")


def topk_bytes(tokens: float, num_entries: float, assumed: Assumed) -> float:
    """Estimate the size of a stage's files in bytes, given the number of entries per token."""
    return tokens * num_entries * assumed.take("bytes_per_entry")


def train_bytes(parameters: float, keep_checkpoints: int) -> float:
    """Estimate the size of the checkpoints that are kept and of the trained model, in bytes."""
    return parameters * (CHECKPOINT_BYTES * keep_checkpoints + WEIGHT_BYTES)
