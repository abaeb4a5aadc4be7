"""Settings of a source that is trained on the run's own text before its logits are dumped."""

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from stages.contract.fingerprint import ADDED, RUNTIME, Settings
from stages.models.config import ModelConfig
from train.config import LoraConfig, TrainConfig

FOLDS: Final = ("even", "odd")
"""Names of the folds of the shards: the model of a fold was trained on all other shards."""


def fold_of(shard: int) -> str:
    """Return the fold that a shard is in."""
    return FOLDS[shard % len(FOLDS)]


class AdaptConfig(Settings):
    """Settings to adapt a source to the run's text: on its gold tokens, in two folds.

    A model that has seen a document gives its tokens away. So one is trained on the even shards and dumps the odd ones, and one
    the other way round. A document that is in both halves is trained on in neither.
    """

    num_epochs: int = Field(1, ge=1, description="Number of passes over the blocks of the other fold.")
    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate.")
    batch_size: int = Field(256, ge=1, description="Blocks per optimizer step.")
    warmup_ratio: float = Field(0.008, ge=0, le=1, description="Share of all steps in which the rate rises linearly.")
    weight_decay: float = Field(0.1, ge=0, description="Weight decay; not applied to norms and biases.")
    max_length: int = Field(2048, ge=2, description="Tokens per block; a longer segment has a separate block.")
    autocast: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Precision of the forward and backward pass."
    )
    lora: LoraConfig | None = Field(None, description="Train only low-rank adapters; by default all weights.")
    seed: int = Field(42, ge=0, description="Seed of the blocks' order.")

    def training(self, like: TrainConfig, *, isolate: bool = False) -> TrainConfig:
        """Return the settings of the trainer: these, and of another training what changes no result (devices, workers).

        Args:
            like: the other training.
            isolate: packed segments do not see each other, as conversations must not.
        """
        runtime = {
            name: getattr(like, name) for name, field in TrainConfig.model_fields.items() if RUNTIME in field.metadata
        }
        settings = {name: getattr(self, name) for name in type(self).model_fields if name != "max_length"}
        return TrainConfig.model_validate({**runtime, **settings, "lambda": 1.0, "isolate_documents": isolate})


class SourceConfig(ModelConfig):
    """A source model."""

    # Part of the fingerprint of its logits, instead of the setting under [logits].
    backend: Annotated[Literal["transformers", "vllm", "server"] | None, RUNTIME] = Field(
        None,
        description="Backend for this source's logits, instead of `logits.backend`. A source that runs on a server is "
        "not evaluated, and its weights need not be available here.",
    )
    served_model: Annotated[str | None, RUNTIME] = Field(
        None, description="Name of this source on the server, instead of `logits.served_model`."
    )

    adapt: Annotated[AdaptConfig | None, ADDED] = Field(
        None,
        description="Train the source on the run's own text before its logits are dumped; by default it is used "
        "unchanged.",
    )

    @property
    def is_served(self) -> bool:
        """Whether a server runs the model, so that its weights are never read here."""
        return self.backend == "server"

    @model_validator(mode="after")
    def _adapt_what_is_here(self) -> Self:
        if self.is_served and self.adapt is not None:
            raise ValueError(
                "`adapt` trains a source, and backend = 'server' never loads its weights here: remove one of the two"
            )
        return self

    def check_weights(self) -> None:
        """See ``ModelConfig.check_weights``."""
        if not self.is_served:
            super().check_weights()
