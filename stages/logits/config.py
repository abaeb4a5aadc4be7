"""Settings of the logits stage."""

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from stages.contract.fingerprint import ADDED, RUNTIME, Settings

VERSION: Final = 3
"""Version of the stage's algorithm; raised when its code gives other rows for the same settings."""


class LogitsConfig(Settings):
    """Settings for computing each model's top-k logprobs."""

    top_k: int = Field(10, ge=1, le=256, description="Entries kept at each position, at most.")
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
        description="Tokens drawn at each position from what its top-k leave out, in proportion to their probability; each "
        "stands for an equal share of the tail, so that the expected row is the full distribution. With transformers alone; "
        "needs align.tail = 'bucket' and windows that nothing narrows.",
    )
    max_length: int = Field(2048, ge=8, description="Most tokens a model sees at once; longer segments go in windows.")
    backend: Literal["auto", "transformers", "vllm", "server"] = Field(
        "auto",
        description="What runs the model. `auto`: vLLM where it is installed and a GPU is visible, else transformers; what the "
        "first worker of a folder finds stands for all of it, since the two agree to rounding only. `server`: a server that "
        "has the model already, see docs/server.md. A source can have one of its own.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="Of the weights and activations; a server has its own."
    )
    attention: Annotated[Literal["auto", "sdpa", "eager", "flash_attention_2"], RUNTIME] = Field(
        "auto",
        description="Of transformers (vLLM chooses its own). `auto`: FlashAttention 2 where it is installed and a GPU is used, "
        "else SDPA.",
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], RUNTIME] = Field(
        "auto", description="`auto`: a GPU if there is one."
    )
    batch_tokens: Annotated[int, RUNTIME] = Field(
        8192, ge=1, description="Token budget of a batch, padding included; with vLLM tokens of an engine step."
    )
    chunk_positions: Annotated[int, RUNTIME] = Field(
        256,
        ge=1,
        description="Positions whose full logits exist at once with transformers: chunk x vocabulary x 4 bytes.",
    )
    gpu_memory_utilization: Annotated[float, RUNTIME] = Field(
        0.8,
        gt=0,
        lt=1,
        description="Share of a GPU's memory that vLLM plans for. The logits of one window, about 10 bytes x its tokens x "
        "vocabulary, come on top.",
    )
    tensor_parallel_size: Annotated[int, RUNTIME] = Field(
        1, ge=1, description="GPUs that share one model, with vLLM alone: for models that do not fit one GPU."
    )
    served_model: Annotated[str | None, RUNTIME] = Field(
        None, description="What the server calls the model; by default the only one that it serves."
    )
    server_concurrency: Annotated[int, RUNTIME] = Field(
        8, ge=1, description="Requests of a worker that a server has at once."
    )
    server_attempts: Annotated[int, RUNTIME] = Field(
        6, ge=1, description="Tries of a request that fails in a way that may pass; the pauses between them double."
    )
    server_timeout_seconds: Annotated[float, RUNTIME] = Field(
        600, gt=0, description="What a server may take for one request."
    )
    max_bad_fraction: Annotated[float, RUNTIME] = Field(
        0.01, ge=0, le=1, description="A shard with more bad segments than this fails."
    )
    num_workers: Annotated[int | None, RUNTIME] = Field(
        None, ge=1, description="Actors; by default one a GPU, else one."
    )
    cpus_per_worker: Annotated[float, RUNTIME] = Field(
        1, gt=0, description="CPUs of an actor; on a CPU also its threads."
    )
    gpus_per_worker: Annotated[float | None, RUNTIME] = Field(
        None,
        ge=0,
        description="GPUs that Ray reserves for an actor; by default tensor_parallel_size where the cluster has GPUs.",
    )

    @model_validator(mode="after")
    def _one_gpu_with_transformers(self) -> Self:
        if self.backend == "transformers" and self.tensor_parallel_size > 1:
            raise ValueError(
                f"tensor_parallel_size = {self.tensor_parallel_size} splits a model with vLLM alone: set backend = 'vllm', or "
                "tensor_parallel_size = 1"
            )
        return self

    @model_validator(mode="after")
    def _full_distribution_for_draws(self) -> Self:
        if self.tail_samples and self.backend in ("vllm", "server"):
            raise ValueError(
                f"tail_samples = {self.tail_samples} draws from the full distribution, and backend = {self.backend!r} gives "
                "only the largest entries: set backend = 'transformers', or tail_samples = 0"
            )
        if self.tail_samples and self.top_p < 1:
            raise ValueError(
                f"tail_samples = {self.tail_samples} draws from what the top_k leave out, and top_p = {self.top_p} would cut "
                "entries that no draw stands for: set top_p = 1, or tail_samples = 0"
            )
        return self
