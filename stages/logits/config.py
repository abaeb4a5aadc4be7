"""Settings of the logits stage."""

from typing import Annotated, Literal

from pydantic import Field

from stages.contract.fingerprint import RUNTIME, Settings


class LogitsConfig(Settings):
    """How each model's top-k logprobs are computed."""

    top_k: int = Field(10, ge=1, le=256, description="Entries kept at each position.")
    max_length: int = Field(2048, ge=8, description="Most tokens a model sees at once; longer segments go in windows.")
    backend: Literal["transformers"] = Field("transformers", description="What runs the model.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="Of the weights and activations.")
    attention: Annotated[Literal["auto", "sdpa", "eager", "flash_attention_2"], RUNTIME] = Field(
        "auto", description="`auto`: FlashAttention 2 where it is installed and a GPU is used, else SDPA."
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], RUNTIME] = Field(
        "auto", description="`auto`: a GPU if there is one."
    )
    batch_tokens: Annotated[int, RUNTIME] = Field(8192, ge=1, description="Token budget of a batch, padding included.")
    chunk_positions: Annotated[int, RUNTIME] = Field(
        512, ge=1, description="Positions whose full logits exist at once: chunk x vocabulary x 4 bytes."
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
        None, ge=0, description="GPUs that Ray reserves for an actor; by default 1 where the cluster has a GPU."
    )
