"""Settings of the align stage."""

from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from stages.contract.fingerprint import RUNTIME, Settings

VERSION: Final = 6
"""Version of the stage's algorithm; raised when its code gives other rows for the same settings.

5: a source token that joins the contents of two messages teaches no end of turn, and contents are paired by message."""

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
        "cost": "prefix",
        "epsilon": 0.2,
    },
}
"""Settings that a preset fills in if the configuration does not give them.

``paper``: PTA-LLM as published: every position of the edit-distance pairing, balanced transport into the target's own
top-k, each source candidate to one column. Good for reproducing the paper's figures. A token that is not in the target's
window gets nothing, and none can rise above the target's own share before rescaling, so its distributions stay close to
what the target already says: a high teacher NLL.

``semi-relaxed``: only positions that condition on the same text; the source's mass goes where its text is, also to
tokens outside the target's window, and the target's probabilities are a prior. Good for learning from the source: a low
teacher NLL, no iteration, and a tail that keeps the source's own confidence. It leaves out the positions inside a
source token, which ``paper`` covers: between unlike tokenizers up to a quarter of them (``inexact = "condition"`` takes them
in, conditioned on the bytes read). Its cost and epsilon were chosen on
news and checked on documentation, Python source and six languages, in both directions between two models: in the best
mixture with the target, which rewards what a row adds to it, ``prefix`` at 0.2 beat ``edit-distance`` at 0.5 on all
eight. ``edit-distance`` charges 4 between a line break and the same with four blanks, so nothing moves there.
"""

TRANSPORT_SETTINGS: Final = ("cost", "marginals", "support", "projection", "epsilon", "tolerance", "max_iterations")
"""Settings that only ``method = "transport"`` reads."""

_SINKHORN_SETTINGS: Final = ("tolerance", "max_iterations")


class AlignConfig(Settings):
    """Settings for moving a source's distributions into the target's vocabulary (pairing, transport, projection).

    Pairing, ``inexact``, the window (``top_k``, ``top_p``) and ``tail`` mean the same for every method. The settings of
    ``TRANSPORT_SETTINGS`` are read only by ``method = "transport"``; for another method a preset does not fill them in.
    """

    preset: Annotated[Literal["paper", "semi-relaxed"] | None, RUNTIME] = Field(
        None,
        description="Defaults for the settings that are not given here: `paper` (PTA-LLM as published) or "
        "`semi-relaxed`.",
    )
    pairing: Literal["edit-distance", "boundary"] = Field(
        "edit-distance", description="The paper's dynamic token pairing, or positions that end at the same byte."
    )
    inexact: Literal["transport", "gold", "mask", "condition"] = Field(
        "transport",
        description="What to do with a position whose contexts differ, or that has no partner: transport it anyway "
        "(or mask it, if it has no partner), put all mass on the gold next token, or mask it. `condition` "
        "(semi-relaxed, with shared boundaries): inside a source token, take the source's candidates that begin with "
        "the bytes read since its last boundary, and transport the rest of each; mask positions that cannot be "
        "conditioned.",
    )
    method: Literal["transport", "min-edit", "exact"] = Field(
        "transport",
        description="Optimal transport; or baselines that map each source candidate to one token: the nearest one of "
        "the whole target vocabulary in edits (FuseLLM), or the token of the same text (candidates without one go to "
        "the tail, or are dropped and the rest is rescaled).",
    )
    cost: Literal["edit-distance", "prefix", "semantic"] = Field(
        "edit-distance",
        description="Transport: cost of moving mass between two tokens, in edits: the Levenshtein distance of their "
        "texts; 0.1 per byte of difference where one text begins with the other and the tokenizers would really cut "
        "it this way; or the cosine distance of the target model's input embeddings, scaled to edits.",
    )
    marginals: Literal["balanced", "source"] = Field(
        "balanced", description="Marginals that must hold: both (Sinkhorn), or only the source's (closed form)."
    )
    support: Literal["target", "union"] = Field(
        "target",
        description="Target candidates: the target's own top-k, or these and the tokens with which each source "
        "candidate's text begins.",
    )
    projection: Literal["argmax", "plan"] = Field(
        "argmax", description="Select each source row's largest entry and renormalise, or sum the plan's columns."
    )
    tail: Literal["renormalise", "bucket"] = Field(
        "renormalise", description="Rescale the source's top-k to 1, or keep the missing mass as the row's tail mass."
    )
    epsilon: float = Field(1 / 30, gt=0, description="Entropic regularisation, in units of the cost (edits).")
    tolerance: float = Field(1e-5, gt=0, description="Balanced: Sinkhorn stops at this largest marginal violation.")
    max_iterations: int = Field(
        2000,
        ge=1,
        description="Balanced: maximum number of Sinkhorn iterations; problems that do not converge are counted.",
    )
    top_k: int = Field(
        10, ge=1, le=256, description="Number of source candidates, and of entries kept of a projected row."
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Narrows both models' windows to the smallest prefix of the top-k that holds this probability (all of "
        "the top-k where it holds less).",
    )
    num_workers: Annotated[int | None, RUNTIME] = Field(
        None, ge=1, description="Number of actors; by default one per CPU."
    )
    cpus_per_worker: Annotated[float, RUNTIME] = Field(1, gt=0, description="CPUs that Ray reserves per actor.")
    max_bad_fraction: Annotated[float, RUNTIME] = Field(
        0.01, ge=0, le=1, description="A shard with more bad segments than this fails."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        name = values.get("preset") if isinstance(values, dict) else None
        if isinstance(name, str) and name in PRESETS:
            preset = PRESETS[name]
            if values.get("method", "transport") != "transport":
                preset = {name: value for name, value in preset.items() if name not in TRANSPORT_SETTINGS}
            return {**preset, **values}
        return values

    @model_validator(mode="after")
    def _refuse_conditioning_without_its_transport(self) -> Self:
        """Refuse settings with which rests of tokens cannot be moved.

        Rests move by the prefix cost, and where only the source's marginal binds.
        """
        needed = {"method": "transport", "pairing": "boundary", "marginals": "source", "cost": "prefix"}
        wrong = [f"{name} = {value!r}" for name, value in needed.items() if getattr(self, name) != value]
        if self.inexact == "condition" and wrong:
            chosen = ", ".join(
                f"{name} = {getattr(self, name)!r}" for name in needed if getattr(self, name) != needed[name]
            )
            raise ValueError(
                f"inexact = 'condition' needs {', '.join(wrong)}, and the configuration has {chosen}: it moves the "
                "rest of a source token. Choose preset = 'semi-relaxed', or another `inexact`"
            )
        return self

    @model_validator(mode="after")
    def _refuse_empty_choice(self) -> Self:
        if self.method != "transport":
            if self.cost != "edit-distance":
                raise ValueError(
                    f"cost = {self.cost!r} is a cost of transport, but method = {self.method!r} does not use it: "
                    "remove `cost`, or choose method = 'transport'"
                )
        elif self.marginals == "balanced" and self.projection == "plan":
            raise ValueError(
                "marginals = 'balanced' with projection = 'plan' gives back the target's own distribution (the plan's column "
                "sums are its target marginal): choose projection = 'argmax', or marginals = 'source'"
            )
        return self

    def result_settings(self) -> dict[str, Any]:
        """Return the settings that change results with this method and these marginals.

        Settings that only another method reads are left out; of Sinkhorn's settings, which the closed form of
        ``marginals = "source"`` does not read, the defaults are given.
        """
        settings = super().result_settings()
        defaults = type(self).model_fields
        if self.method != "transport":
            return {name: value for name, value in settings.items() if name not in TRANSPORT_SETTINGS}
        if self.marginals == "source":
            settings.update({name: defaults[name].default for name in _SINKHORN_SETTINGS})
        return settings
