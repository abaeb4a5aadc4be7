"""Settings of the train stage and of the evaluation."""

from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from stages.contract.fingerprint import ADDED, RUNTIME, Settings
from stages.models.config import absolute_path

TRAIN_VERSION: Final = 3
"""Version of the train stage; raised when the same settings and blocks give another model."""
EVAL_VERSION: Final = 2
"""Version of the eval stage; raised when the same model and text give another figure."""

SUITE_NAMES: Final = ("gsm8k", "bbh", "multipl-e", "mmlu", "toxigen", "tydiqa", "lambada")
"""Benchmarks that ``[eval] suites`` may name."""


class LoraConfig(Settings):
    """Settings of low-rank adapters (Hu et al. 2021), trained instead of all weights and merged into them on export."""

    r: int = Field(16, ge=1, description="Rank of the adapters.")
    alpha: float = Field(32, gt=0, description="Their product is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of the adapters' input.")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        description="Names of the layers with an adapter, e.g. ['q_proj', 'v_proj']; by default all except the LM "
        "head.",
    )


class TrainConfig(Settings):
    """Settings of training; the defaults are PTA-LLM's."""

    lambda_: float = Field(
        0.8,
        alias="lambda",
        ge=0,
        le=1,
        description="Weight of the gold tokens' loss: L = lambda L_CLM + (1 - lambda) L_fusion.",
    )
    lambda_schedule: Literal["constant", "linear"] = Field(
        "constant", description="`linear`: from `lambda` at the first step to `lambda_end` at the last."
    )
    lambda_end: float | None = Field(None, ge=0, le=1, description='For `lambda_schedule = "linear"`.')
    fusion_loss: Literal["forward-kl", "reverse-kl"] = Field(
        "forward-kl",
        description="`forward-kl`: the paper's cross-entropy under the fused distribution; `reverse-kl`: KL(model || fused).",
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="Temperature of both distributions in L_fusion, over the row's ids and the rest "
        "(train/objective/divergence.py).",
    )
    tail_loss: Annotated[Literal["bucket", "gold"], ADDED] = Field(
        "bucket",
        description="How L_fusion treats the mass outside a row's ids (align.tail = 'bucket'). `bucket`: the model "
        "should leave the same mass; `gold`: -ln q(gold) once where the row does not list the gold token.",
    )
    isolate_documents: bool = Field(
        False,
        description="Packed documents do not see each other: attention and position ids restart with each, and with "
        "each segment that continues a document, because the models that it learns from did not see the text before "
        "it.",
    )
    batch_size: int = Field(256, ge=1, description="Blocks per optimizer step.")
    micro_batch_size: Annotated[int, RUNTIME] = Field(1, ge=1, description="Blocks per forward pass of a worker.")
    num_epochs: int = Field(1, ge=1, description="Number of passes over all blocks.")
    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate.")
    warmup_ratio: float = Field(0.008, ge=0, le=1, description="Share of all steps in which the rate rises linearly.")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="After the warm-up; cosine falls to 0.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the mean of gradients.")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's decay of the mean of squared gradients.")
    weight_decay: float = Field(0.1, ge=0, description="Weight decay; not applied to norms and biases.")
    clip_norm: float = Field(1.0, gt=0, description="Maximum norm of the gradient.")
    lora: LoraConfig | None = Field(None, description="Train only low-rank adapters; by default all weights.")
    autocast: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="Precision of the forward and backward pass; weights, the sum of gradients and AdamW are float32.",
    )
    gradient_checkpointing: Annotated[bool, RUNTIME] = Field(
        False, description="Recompute activations in the backward pass."
    )
    reshard_after_forward: Annotated[bool, RUNTIME] = Field(
        True, description="Free a layer's gathered parameters between its forward and backward pass, to save memory."
    )
    compile: Annotated[bool, RUNTIME] = Field(False, description="torch.compile each decoder layer.")
    attention: Annotated[Literal["auto", "sdpa", "eager", "flash_attention_2"], RUNTIME] = Field(
        "auto", description="`auto`: FlashAttention 2 if it is installed and a GPU is used, otherwise SDPA."
    )
    chunk_positions: Annotated[int, RUNTIME] = Field(
        256,
        ge=1,
        description="Positions whose full logits are in memory at once; more are faster on a GPU with enough memory.",
    )
    checkpoint_every_steps: Annotated[int, RUNTIME] = Field(
        500, ge=1, description="Number of steps between checkpoints; one is also written after the last step."
    )
    keep_checkpoints: Annotated[int, RUNTIME] = Field(
        2, ge=1, description="Number of newest checkpoints to keep on disk."
    )
    seed: int = Field(42, ge=0, description="Seed of the blocks' order.")
    device: Annotated[Literal["auto", "cpu", "cuda"], RUNTIME] = Field(
        "auto", description="`auto`: a GPU if there is one."
    )
    num_workers: Annotated[int, RUNTIME] = Field(
        1, ge=1, description="Number of training processes; batch_size must be a multiple of it times micro_batch_size."
    )
    cpus_per_worker: Annotated[float, RUNTIME] = Field(
        1, gt=0, description="CPUs per training process; on CPUs also its number of threads."
    )
    gpus_per_worker: Annotated[int | None, RUNTIME] = Field(
        None, ge=0, le=1, description="GPUs per training process: 0 or 1; by default 1 if there are GPUs."
    )
    max_failures: Annotated[int, RUNTIME] = Field(
        3, ge=0, description="Number of worker deaths after which the job gives up."
    )
    gpu_memory_gb: Annotated[float | None, RUNTIME] = Field(
        None, gt=0, description="Memory of one GPU, 10^9 bytes: `--dry-run` refuses a training that does not fit."
    )
    peak_tflops: Annotated[float | None, RUNTIME] = Field(
        None, gt=0, description="Dense bf16 peak of one GPU, for the MFU; by default known for common data-centre GPUs."
    )
    wandb: Annotated[bool | str, RUNTIME] = Field(
        False, description="Also log to Weights & Biases (needs `wandb`); a string is the project's name."
    )

    @model_validator(mode="after")
    def _lambda_end_goes_with_its_schedule(self) -> Self:
        if (self.lambda_schedule == "linear") != (self.lambda_end is not None):
            raise ValueError('`lambda_end` and `lambda_schedule = "linear"` go together: give both or neither')
        return self

    @model_validator(mode="after")
    def _gold_tail_is_cross_entropy(self) -> Self:
        if self.tail_loss == "gold" and (self.fusion_loss != "forward-kl" or self.temperature != 1):
            raise ValueError(
                f"tail_loss = 'gold' adds cross-entropy, so it goes with fusion_loss = 'forward-kl' at temperature = 1; found "
                f"{self.fusion_loss!r} at {self.temperature:g}"
            )
        return self

    @property
    def uses_fusion(self) -> bool:
        """Whether some step has a weight on the fusion loss."""
        return self.lambda_ < 1 or (self.lambda_end is not None and self.lambda_end < 1)

    @model_validator(mode="after")
    def _batch_is_shared_equally(self) -> Self:
        self.check_batch_size(self.num_workers)
        return self

    def check_batch_size(self, num_workers: int) -> None:
        """Refuse a batch that cannot be shared equally.

        Args:
            num_workers: training processes.

        Raises:
            ValueError: lists settings that work.
        """
        passes = num_workers * self.micro_batch_size
        below, rest = divmod(self.batch_size, passes)
        if not rest:
            return
        sizes = " or ".join(str(passes * number) for number in (below, below + 1) if number)
        per_worker = self.batch_size / self.micro_batch_size
        counts = [str(number) for number in range(1, 2 * num_workers + 1) if per_worker % number == 0]
        raise ValueError(
            f"batch_size = {self.batch_size} is not a multiple of num_workers x micro_batch_size = {num_workers} x "
            f"{self.micro_batch_size} = {passes}, so its blocks cannot be divided equally: set batch_size to {sizes}"
            + (
                f", or num_workers to {', '.join(counts)}"
                if counts
                else ", or choose a micro_batch_size that divides it"
            )
        )


class EvalConfig(Settings):
    """Settings of the evaluation on held-out text."""

    split: Annotated[Literal["validation", "test"], ADDED] = Field(
        "validation", description="Held-out documents to score; `test` needs `shard.test_fraction`."
    )
    max_length: int = Field(2048, ge=8, description="Maximum number of tokens that a model sees at once.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Precision of weights and activations. Trained weights are float32: rounding them hides part of "
        "the training and adds noise as large as the differences between methods.",
    )
    attention: Annotated[Literal["auto", "sdpa", "eager", "flash_attention_2"], RUNTIME] = Field(
        "auto", description="`auto`: FlashAttention 2 if it is installed and a GPU is used, otherwise SDPA."
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], RUNTIME] = Field(
        "auto",
        description="`auto`: a GPU if there is one; on a Ray cluster that can grow, the device of training. On Ray, "
        "each evaluation is a task, which reserves one GPU if it uses one.",
    )
    cpus_per_worker: Annotated[float | None, RUNTIME] = Field(
        None,
        gt=0,
        description="CPUs per evaluation; on CPUs also its number of threads; by default `train.cpus_per_worker`.",
    )
    batch_tokens: Annotated[int, RUNTIME] = Field(8192, ge=1, description="Token budget of a batch, including padding.")
    chunk_positions: Annotated[int, RUNTIME] = Field(
        512, ge=1, description="Positions whose full logits are in memory at once."
    )
    max_documents: int | None = Field(
        None, ge=1, description="Number of held-out documents to use, from the first; by default all."
    )
    num_generations: Annotated[int, ADDED] = Field(
        0,
        ge=0,
        description="Number of held-out conversations whose last answer every model generates greedily, to count how "
        "often it ends its turn. Needs `dataset.messages_column`.",
    )
    generation_tokens: Annotated[int, ADDED] = Field(
        128, ge=1, description="Maximum number of tokens of such an answer; an answer that is cut there has not ended."
    )
    # The following settings do not affect bits per byte; each result of a suite has a separate fingerprint.
    suites: Annotated[tuple[str, ...], RUNTIME] = Field(
        (),
        description=f"Benchmarks of lm-evaluation-harness, in addition to bits per byte: {', '.join(SUITE_NAMES)}; "
        "`bbh/navigate` is one sub-task. None by default. See docs/evaluation.md.",
    )
    suite_models: Annotated[tuple[str, ...], RUNTIME] = Field(
        (),
        description="Models to run the suites on, by name, `fused` for the trained one; by default the target before "
        "training and the trained one.",
    )
    data: Annotated[Path | None, AfterValidator(absolute_path), RUNTIME] = Field(
        None,
        description="Folder with the suites' local files; by default `$PTAFUSE_DATA/eval` if that is set, otherwise "
        "the hub.",
    )
    limit: Annotated[int | None, RUNTIME] = Field(
        None, ge=1, description="Number of documents of each sub-task of a suite, from the first; by default all."
    )
    apply_chat_template: Annotated[bool, RUNTIME] = Field(
        False,
        description="Ask the questions of the suites as turns of a user, under each model's chat template, as "
        "instruct models expect them. `multipl-e` continues code, and is not affected.",
    )
    suite_batch_size: Annotated[int, RUNTIME] = Field(4, ge=1, description="Requests of a suite per forward pass.")
    execute_code: Annotated[bool, RUNTIME] = Field(
        False, description="Run the programs that models write for `multipl-e` in a sandbox (docs/evaluation.md)."
    )

    @field_validator("suites")
    @classmethod
    def _suites_are_known(cls, suites: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in suites if name.partition("/")[0] not in SUITE_NAMES]
        if unknown:
            raise ValueError(f"unknown suite {unknown[0]!r}; known: {', '.join(SUITE_NAMES)}, or e.g. bbh/navigate")
        return suites
