"""Settings of the fuse stage."""

from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from stages.contract.fingerprint import ADDED, RUNTIME, Settings

VERSION: Final = 3
"""Version of the stage's algorithm; raised when its code gives other rows for the same settings."""
FIT_VERSION: Final = 2
"""Version of the fit stage's algorithm, which fits the weights of ``function = "fitted"``."""
ROW_GROUP_BYTES: Final = 2**20
"""Size of a row group of its files in memory: training reads blocks in a random order, and decodes a row group for each.
Half of it reads no faster and compresses worse; with twice as much a CPU decodes 0.4 M tokens per second instead of 0.6."""


class FuseConfig(Settings):
    """Settings for mixing the candidates at each position, and for packing segments into training blocks."""

    function: Literal["min-ce", "avg-ce", "fitted", "target"] = Field(
        "min-ce",
        description="Take the candidate with the lowest cross-entropy on the gold text, weight all by exp(-CE), "
        "mix all candidates with weights fitted on the training text (the stage `fit`; needs align.tail = 'bucket'), or "
        "take the target's own distribution before training (self-distillation, a control: no source has any weight).",
    )
    per: Annotated[Literal["run", "kind"], ADDED] = Field(
        "run",
        description="For function = 'fitted': one set of weights, or one per kind of document (`dataset.kind_column`).",
    )
    fit_shards: Annotated[int, ADDED] = Field(
        64,
        ge=1,
        description="For function = 'fitted': number of shards to fit weights on, evenly spread; all shards if there "
        "are fewer.",
    )
    uncovered: Annotated[Literal["target", "none"], ADDED] = Field(
        "target",
        description="What to train on where no source has a distribution: the target's own distribution before training "
        "(as in the paper), or only the gold token.",
    )
    granularity: Literal["document", "segment", "token", "block"] = Field(
        "document", description="Span over which a candidate is judged."
    )
    unit: Literal["bits-per-byte", "nats-per-token"] = Field(
        "bits-per-byte", description="Unit of the cross-entropy: comparable between tokenizers, or the paper's."
    )
    max_length: int = Field(2048, ge=2, description="Tokens per training block.")
    packing: Literal["whole", "cut"] = Field(
        "whole",
        description="`whole`: no segment is cut, blocks are filled by best fit decreasing; `cut`: the concatenation is cut "
        "every `max_length` tokens (the paper; the default with align.preset = 'paper').",
    )
    min_context: int = Field(
        32,
        ge=0,
        description="`cut`: positions with fewer tokens of their segment before them in the block have no fused "
        "distribution, because its context is missing.",
    )
    top_k: int = Field(10, ge=1, le=256, description="Entries kept of a mixed row; the mass of the others is counted.")
    num_workers: Annotated[int | None, RUNTIME] = Field(
        None, ge=1, description="Number of actors; by default one per CPU."
    )
    cpus_per_worker: Annotated[float, RUNTIME] = Field(1, gt=0, description="CPUs that Ray reserves per actor.")

    def result_settings(self) -> dict[str, Any]:
        """Return the settings that change results; at their defaults those that this function or packing does not read."""
        settings = super().result_settings()
        unread = ["min_context"] if self.packing == "whole" else []
        if self.function in ("fitted", "target"):  # no cross-entropies of spans are compared
            unread += ["granularity", "unit"]
        for name in unread:
            settings[name] = type(self).model_fields[name].default
        if self.function != "fitted":
            for name in ("per", "fit_shards"):  # added later: left out at their defaults
                settings.pop(name, None)
        return settings

    @model_validator(mode="after")
    def _kinds_need_fitted_weights(self) -> Self:
        if self.per == "kind" and self.function not in ("fitted", "target"):
            raise ValueError(
                f"per = 'kind' fits weights for each kind of document, and function = {self.function!r} fits none: set "
                "function = 'fitted', or remove per"
            )
        return self
