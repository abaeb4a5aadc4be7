"""Settings of the logits stage."""

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from stages.contract.fingerprint import ADDED, RUNTIME, Settings

VERSION: Final = 3
"""Version of the stage's algorithm; raised when its code gives other rows for the same settings."""


class LogitsConfig(Settings):
    """Settings for computing each model's top-k logprobs."""

    top_k: int = Field(10, ge=1, le=256, description="Maximum number of entries kept at each position.")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="A position keeps the smallest prefix of its top-k that holds this probability; 1: always all k.",
    )
    tail_samples: Annotated[int, ADDED] = Field(
        0,
        ge=0,
        le=256,
        description="Tokens drawn at each position from outside its top-k, in proportion to their probability; each "
        "stands for an equal share of the tail, so that the expected row is the full distribution. Only with "
        "transformers; needs align.tail = 'bucket' and windows that are not narrowed.",
    )
    max_length: int = Field(
        2048,
        ge=8,
        description="Maximum number of tokens that a model sees at once; longer segments are processed in windows.",
    )
    backend: Literal["auto", "transformers", "vllm", "server"] = Field(
        "auto",
        description="Backend that runs the model. `auto`: vLLM if it is installed and a GPU is visible, otherwise "
        "transformers; the first worker of a folder decides for all others, because the two agree only up to "
        "rounding. `server`: a server that already has the model, see docs/server.md. Can be set separately for a "
        "source.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="Precision of weights and activations; a server uses its own."
    )
    attention: Annotated[Literal["auto", "sdpa", "eager", "flash_attention_2"], RUNTIME] = Field(
        "auto",
        description="Attention of transformers (vLLM chooses its own). `auto`: FlashAttention 2 if it is installed "
        "and a GPU is used, otherwise SDPA.",
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], RUNTIME] = Field(
        "auto", description="`auto`: a GPU if there is one."
    )
    batch_tokens: Annotated[int, RUNTIME] = Field(
        8192, ge=1, description="Token budget of a batch, including padding; with vLLM, tokens per engine step."
    )
    chunk_positions: Annotated[int, RUNTIME] = Field(
        256,
        ge=1,
        description="Positions whose full logits are in memory at once with transformers: chunk x vocabulary x 4 "
        "bytes.",
    )
    gpu_memory_utilization: Annotated[float, RUNTIME] = Field(
        0.8,
        gt=0,
        lt=1,
        description="Share of a GPU's memory that vLLM plans for. The logits of one window, about 10 bytes x its "
        "tokens x vocabulary, are needed in addition.",
    )
    tensor_parallel_size: Annotated[int, RUNTIME] = Field(
        1, ge=1, description="GPUs that share one model, only with vLLM: for models that do not fit on one GPU."
    )
    served_model: Annotated[str | None, RUNTIME] = Field(
        None, description="Name of the model on the server; by default the only one that it serves."
    )
    server_concurrency: Annotated[int, RUNTIME] = Field(
        8, ge=1, description="Number of concurrent requests of a worker to a server."
    )
    server_attempts: Annotated[int, RUNTIME] = Field(
        6,
        ge=1,
        description="Number of attempts at a request that fails in a way that may be temporary; the pauses between "
        "them double.",
    )
    server_timeout_seconds: Annotated[float, RUNTIME] = Field(
        600, gt=0, description="Timeout of one request to a server."
    )
    max_bad_fraction: Annotated[float, RUNTIME] = Field(
        0.01, ge=0, le=1, description="A shard with more bad segments than this fails."
    )
    num_workers: Annotated[int | None, RUNTIME] = Field(
        None, ge=1, description="Number of actors; by default one per GPU, or one without GPUs."
    )
    cpus_per_worker: Annotated[float, RUNTIME] = Field(
        1, gt=0, description="CPUs per actor; on CPUs also its number of threads."
    )
    gpus_per_worker: Annotated[float | None, RUNTIME] = Field(
        None,
        ge=0,
        description="GPUs that Ray reserves per actor; by default tensor_parallel_size if the cluster has GPUs.",
    )

    @model_validator(mode="after")
    def _one_gpu_with_transformers(self) -> Self:
        if self.backend == "transformers" and self.tensor_parallel_size > 1:
            raise ValueError(
                f"tensor_parallel_size = {self.tensor_parallel_size} splits a model, which needs vLLM: set backend = "
                "'vllm', or tensor_parallel_size = 1"
            )
        return self

    @model_validator(mode="after")
    def _full_distribution_for_draws(self) -> Self:
        if self.tail_samples and self.backend in ("vllm", "server"):
            raise ValueError(
                f"tail_samples = {self.tail_samples} draws from the full distribution, and backend = {self.backend!r} "
                "returns only the largest entries: set backend = 'transformers', or tail_samples = 0"
            )
        if self.tail_samples and self.top_p < 1:
            raise ValueError(
                f"tail_samples = {self.tail_samples} draws from outside the top_k, and top_p = {self.top_p} would cut "
                "entries for which no draws stand: set top_p = 1, or tail_samples = 0"
            )
        return self
