"""Settings of the baselines that train nothing: the ensemble and the average of weights (docs/baselines.md)."""

from typing import Annotated, Any, Final, Literal

from pydantic import Field

from stages.contract.fingerprint import RUNTIME, Settings

ENSEMBLE: Final = "ensemble"
WEIGHT_AVERAGE: Final = "weight-average"
Baseline = Literal["ensemble", "weight-average"]
BASELINE_LABELS: Final[dict[str, str]] = {
    ENSEMBLE: "ensemble of target and sources",
    WEIGHT_AVERAGE: "average of the weights",
}

ENSEMBLE_VERSION: Final = 1
WEIGHT_AVERAGE_VERSION: Final = 1
"""Version of each algorithm; raised when the code gives another figure for the same settings."""


class AverageRefusedError(ValueError):
    """Error of models whose weights cannot be averaged; the message says why, in one line."""


Weights = tuple[Annotated[float, Field(ge=0, lt=1)], ...]


class BaselinesConfig(Settings):
    """Settings of the baselines, which are evaluated without training (docs/baselines.md)."""

    ensemble: Annotated[bool, RUNTIME] = Field(
        False,
        description="Evaluate the token-level ensemble: the target's distribution mixed with the sources' aligned ones.",
    )
    ensemble_weights: Weights | None = Field(
        None,
        description="Weight of each source, in their order; the target has the rest. By default all models have the "
        "same weight.",
    )
    ensemble_contexts: Literal["prefix", "segment"] = Field(
        "prefix",
        description="What a source reads before it predicts. `prefix`: the text so far, tokenized by itself, as a "
        "decoder would; `segment`: the tokens of the whole segment, where one ends there: cheaper, but it uses later "
        "text to know where the source's tokens end.",
    )
    weight_average: Annotated[bool, RUNTIME] = Field(
        False,
        description="Evaluate the mean of the models' weights, where their architectures and vocabularies agree.",
    )
    average_weights: Weights | None = Field(
        None,
        description="Weight of each source's tensors, in their order; the target's have the rest. By default all have "
        "the same weight.",
    )

    @property
    def methods(self) -> tuple[Baseline, ...]:
        """What is evaluated."""
        wanted: dict[Baseline, bool] = {ENSEMBLE: self.ensemble, WEIGHT_AVERAGE: self.weight_average}
        return tuple(name for name, is_wanted in wanted.items() if is_wanted)

    def check(self, num_sources: int) -> None:
        """Refuse weights that do not fit the sources.

        Raises:
            ValueError: says which.
        """
        for name, given in (("ensemble_weights", self.ensemble_weights), ("average_weights", self.average_weights)):
            if given is not None and (len(given) != num_sources or not sum(given) < 1):
                raise ValueError(
                    f"baselines.{name} = {list(given)}: expected one number for each of the {num_sources} sources, "
                    "with a sum below 1, because the target has the rest"
                )

    def source_weights(self, baseline: Baseline, num_sources: int) -> tuple[float, ...]:
        """Return each source's weight; the target has the rest of 1."""
        given = self.ensemble_weights if baseline == ENSEMBLE else self.average_weights
        return given if given is not None else (1 / (num_sources + 1),) * num_sources

    def baseline_settings(self, baseline: Baseline, num_sources: int) -> dict[str, Any]:
        """Return the settings that change this baseline's result."""
        settings: dict[str, Any] = {"weights": list(self.source_weights(baseline, num_sources))}
        if baseline == ENSEMBLE:
            return {**settings, "contexts": self.ensemble_contexts, "version": ENSEMBLE_VERSION}
        return {**settings, "version": WEIGHT_AVERAGE_VERSION}
