"""Settings of ``ptafuse plan``: prices, and assumptions where the run has measured nothing yet."""

from typing import Final

from pydantic import Field

from stages.contract.fingerprint import Settings

HUB_DATASETS: Final[dict[tuple[str, str], tuple[int, int]]] = {
    ("JeanKaddour/minipile", "train"): (1_000_000, 5_906_108_510),
}
"""(hub id, split) -> documents, bytes of text, from the dataset's card: planning fetches nothing."""


class PricesConfig(Settings):
    """Prices in your currency. Items without a price are left out of the sum, and ``plan`` says so."""

    gpu_hour: float | None = Field(
        None, ge=0, description="Price of a GPU for an hour, including the CPUs of its worker."
    )
    core_hour: float | None = Field(
        None, ge=0, description="Price of a CPU core for an hour, for workers without a GPU."
    )
    gb_month: float | None = Field(None, ge=0, description="Price of 10^9 bytes in the run directory for a month.")


class AssumptionsConfig(Settings):
    """Assumptions of ``plan`` until the run has measured better values.

    Each one that is used is printed with its source.
    """

    num_documents: int | None = Field(
        None, ge=1, description="Documents of the dataset, if neither its files nor its card give the number."
    )
    text_bytes: float | None = Field(
        None, gt=0, description="Bytes of the dataset's text, if neither its files nor its card give the number."
    )
    parameters: dict[str, float] = Field(
        {},
        description="Number of parameters of a model, by its name in this configuration, if it cannot be determined.",
    )
    expansion: float = Field(
        2.5,
        ge=1,
        description="Bytes of text per byte of a compressed or Parquet file; typical for English text under zstd.",
    )
    bytes_per_token: float = Field(
        3.93, gt=0, description="Bytes of text per token: MiniPile's 5.9 GB are about 1.5 billion Llama-2 tokens."
    )
    gpu_forward_rate: float = Field(
        1.94e14,
        gt=0,
        description="Parameters times tokens per second of a GPU in logits and eval: about 15 H100-hours for 7 "
        "billion parameters and 1.5 billion tokens.",
    )
    cpu_forward_rate: float = Field(
        7.8e10,
        gt=0,
        description="Parameters times tokens per second of a CPU core in logits and eval: measured with SmolLM2-135M, "
        "bfloat16, 1,153 tokens/s on 2 virtual cores.",
    )
    gpu_train_rate: float = Field(
        6.6e13,
        gt=0,
        description="Parameters times tokens per second of a GPU in training: 6 operations each, at 40 % of the 989 "
        "TFLOP/s of an H100's data sheet (dense bfloat16); a quarter less with gradient checkpointing. Not measured.",
    )
    cpu_train_rate: float = Field(
        1.6e10,
        gt=0,
        description="Parameters times tokens per second of a CPU core in training: measured with SmolLM2-135M, 243 "
        "tokens/s on 2 virtual cores.",
    )
    eager_slowdown: float = Field(
        1.5,
        ge=1,
        description="Factor by which eager attention is slower on a GPU: at 2,048 tokens the scores of 32 layers of "
        "32 heads, read and written in 28 bytes each, take 17 microseconds per token on an H100, on top of 35 for the "
        "rest of 7 billion parameters. Not measured.",
    )
    gpu_from_parameters: float = Field(
        1e9,
        ge=0,
        description="With device = 'auto' a model with this many parameters or more is assumed to run on a GPU.",
    )
    shard_rate: float = Field(
        330_000,
        gt=0,
        description="Tokens times tokenizers that a core processes per second in shard: measured in the demo's run.",
    )
    align_rate: float = Field(
        27_000,
        gt=0,
        description="Tokens that a core aligns per second with edit-distance pairing: measured in the demo's run.",
    )
    align_boundary_rate: float = Field(
        40_000,
        gt=0,
        description="Tokens that a core aligns per second with pairing = 'boundary': measured in the demo's run.",
    )
    fuse_rate: float = Field(
        105_000, gt=0, description="Tokens that a core fuses per second: measured in the demo's run."
    )
    text_compression: float = Field(
        0.7,
        gt=0,
        description="Bytes of a shard file per byte of text: measured in the demo's run, whose shards are small.",
    )
    bytes_per_entry: float = Field(
        4.2, gt=0, description="Bytes per token and kept entry in logits, align and fuse files: 27 to 42 for 10 entries in the "
        "demo's run.",
    )  # fmt: skip
