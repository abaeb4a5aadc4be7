"""Settings of the align stage."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.contract.fingerprint import RUNTIME, Settings

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "pairing": "edit-distance",
        "inexact": "transport",
        "marginals": "balanced",
        "support": "target",
        "projection": "argmax",
        "tail": "renormalise",
        "epsilon": 1 / 30,
        "tolerance": 1e-5,
    },
    "semi-relaxed": {
        "pairing": "boundary",
        "inexact": "mask",
        "marginals": "source",
        "support": "union",
        "projection": "plan",
        "tail": "bucket",
        "epsilon": 0.5,
    },
}
"""``paper``: PTA-LLM as published. ``semi-relaxed``: the source decides, the target is a prior; lowest teacher NLL."""


class AlignConfig(Settings):
    """How a source's distributions move into the target's vocabulary (algorithm: pairing, transport, projection)."""

    preset: Annotated[Literal["paper", "semi-relaxed"] | None, RUNTIME] = Field(
        None, description="Fills what is not given here: `paper` (PTA-LLM as published) or `semi-relaxed`."
    )
    pairing: Literal["edit-distance", "boundary"] = Field(
        "edit-distance", description="The paper's dynamic token pairing, or positions that end at the same byte."
    )
    inexact: Literal["transport", "gold", "mask"] = Field(
        "transport",
        description="A position whose contexts differ, or without partner: transport it all the same (without a partner: "
        "mask), put all mass on the gold next token, or leave it out.",
    )
    marginals: Literal["balanced", "source"] = Field(
        "balanced", description="Which marginals bind: both (Sinkhorn), or the source's alone (closed form)."
    )
    support: Literal["target", "union"] = Field(
        "target", description="The target's own top-k, or that and the tokens that begin each source candidate's text."
    )
    projection: Literal["argmax", "plan"] = Field(
        "argmax", description="Select each source row's largest entry and renormalise, or sum the plan's columns."
    )
    tail: Literal["renormalise", "bucket"] = Field(
        "renormalise", description="Rescale the source's top-k to 1, or keep what it lacks of 1 as the row's tail mass."
    )
    epsilon: float = Field(1 / 30, gt=0, description="Entropic regularisation, in units of the cost (edits).")
    tolerance: float = Field(1e-5, gt=0, description="Balanced: largest marginal violation at which Sinkhorn stops.")
    max_iterations: int = Field(
        2000, ge=1, description="Balanced: cap on Sinkhorn iterations; unconverged are counted."
    )
    top_k: int = Field(10, ge=1, le=256, description="Source candidates used, and entries kept of a projected row.")
    num_workers: Annotated[int | None, RUNTIME] = Field(None, ge=1, description="Actors; by default one a CPU.")
    cpus_per_worker: Annotated[float, RUNTIME] = Field(1, gt=0, description="CPUs that Ray reserves for an actor.")
    max_bad_fraction: float = Field(0.01, ge=0, le=1, description="A shard with more bad segments than this fails.")

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") in PRESETS:
            return {**PRESETS[values["preset"]], **values}
        return values

    @model_validator(mode="after")
    def _refuse_empty_choice(self) -> Self:
        if self.marginals == "balanced" and self.projection == "plan":
            raise ValueError(
                "marginals = 'balanced' with projection = 'plan' gives back the target's own distribution (the plan's column "
                "sums are its target marginal): choose projection = 'argmax', or marginals = 'source'"
            )
        return self
