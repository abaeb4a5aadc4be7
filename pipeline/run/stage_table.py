"""The sharded stages in order: what each reads, which settings shape it, how it is built, and what it needs to run.

A *step* is one folder of the run directory: a stage, and its model where the stage runs once a model.

The stages' code is imported where a stage is built: it loads torch and compilers, and ``status``, ``plan`` and ``gc`` need
neither.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pipeline.settings.run import RunConfig
from stages.align.config import VERSION as ALIGN_VERSION
from stages.contract.fingerprint import Settings
from stages.contract.stage import Stage
from stages.fuse.config import VERSION as FUSE_VERSION
from stages.logits.config import VERSION as LOGITS_VERSION
from stages.models.config import ModelConfig
from stages.shard.config import VERSION as SHARD_VERSION


@dataclass(frozen=True)
class Resources:
    """What the workers of a step need.

    Attributes:
        num_workers: None: one a GPU where GPUs are used, else one a CPU slot (``models``: one).
        cpus: of each.
        gpus: of each; None: 1 where the cluster has a GPU.
        models: the workers load models: without GPUs one worker takes all the memory there is to give.
    """

    num_workers: int | None
    cpus: float
    gpus: float | None
    models: bool = False


@dataclass(frozen=True)
class StageSpec:
    """A row of the stage table.

    Attributes:
        name: the stage's name and its folder's.
        version: its algorithm version, part of the fingerprint.
        models: the models that it runs for, each a step; empty: one step without a model.
        inputs: input name, as ``Stage.run`` knows it -> the step that gives it.
        settings: the settings that shape a step's result, for its fingerprint and for people.
        build: the stage for one step.
        section: the stage's own settings.
        train_rows_only: the rows of held-out documents are left out of what it reads.
        choices: settings of its section that are "auto" and change results -> what they come to on this machine.
    """

    name: str
    version: int
    models: Callable[[RunConfig], tuple[ModelConfig, ...]]
    inputs: Callable[[RunConfig, ModelConfig | None], Mapping[str, str]]
    settings: Callable[[RunConfig, ModelConfig | None], dict[str, Any]]
    build: Callable[[RunConfig, ModelConfig | None], Stage]
    section: Callable[[RunConfig], Settings]
    train_rows_only: bool = False
    choices: Callable[[RunConfig, ModelConfig | None], Mapping[str, str]] = field(default=lambda config, model: {})

    def resources(self, config: RunConfig) -> Resources:
        """Workers, CPUs and GPUs, from the stage's settings."""
        section: Any = self.section(config)
        models = self.name == "logits"
        gpus = section.gpus_per_worker if models else 0
        if models and section.device == "cpu":
            gpus = 0
        if gpus is None and section.tensor_parallel_size > 1:
            gpus = section.tensor_parallel_size
        return Resources(section.num_workers, section.cpus_per_worker, gpus, models)

    def max_bad_fraction(self, config: RunConfig) -> float:
        """The share of bad records above which a shard fails; fuse has none to allow."""
        return float(getattr(self.section(config), "max_bad_fraction", 0.0))


def step_key(stage: str, model: ModelConfig | None) -> str:
    """``logits/gemma3``, or ``shard``."""
    return stage if model is None else f"{stage}/{model.name}"


def _model(model: ModelConfig | None) -> ModelConfig:
    assert model is not None
    return model


def _logits_choices(config: RunConfig, model: ModelConfig | None) -> dict[str, str]:
    if config.logits.backend != "auto":
        return {}
    from stages.logits.backends.choose import choose_backend

    return {"backend": choose_backend(config.logits, _model(model))}


def _fuse_inputs(config: RunConfig, _: ModelConfig | None) -> dict[str, str]:
    keys = [f"logits/{model.name}" for model in config.models] + [f"align/{model.name}" for model in config.sources]
    return {key: key for key in keys}


def _shard_stage(config: RunConfig, _: ModelConfig | None) -> Stage:
    from stages.shard.stage import ShardStage

    return ShardStage(config.shard, config.models)


def _logits_stage(config: RunConfig, model: ModelConfig | None) -> Stage:
    from stages.logits.stage import LogitsStage

    return LogitsStage(config.logits, _model(model))


def _align_stage(config: RunConfig, model: ModelConfig | None) -> Stage:
    from stages.align.stage import AlignStage

    return AlignStage(config.align, config.target, _model(model))


def _fuse_stage(config: RunConfig, _: ModelConfig | None) -> Stage:
    from stages.fuse.stage import FuseStage

    return FuseStage(config.fuse, config.target, config.sources)


STAGES: Final[tuple[StageSpec, ...]] = (
    StageSpec(
        name="shard",
        version=SHARD_VERSION,
        models=lambda config: (),
        inputs=lambda config, model: {},  # documents, by the frozen plan
        settings=lambda config, model: {
            "dataset": config.dataset.result_settings(),
            "shard": config.shard.result_settings(),
        },
        build=_shard_stage,
        section=lambda config: config.shard,
    ),
    StageSpec(
        name="logits",
        version=LOGITS_VERSION,
        models=lambda config: config.models,
        inputs=lambda config, model: {"shard": "shard"},
        settings=lambda config, model: {
            "logits": config.logits.result_settings(),
            "weights": _model(model).weights_identity(),
            "tokenizer": _model(model).tokenizer_identity(),
        },
        build=_logits_stage,
        section=lambda config: config.logits,
        train_rows_only=True,
        choices=_logits_choices,
    ),
    StageSpec(
        name="align",
        version=ALIGN_VERSION,
        models=lambda config: config.sources,
        inputs=lambda config, model: {
            "target": f"logits/{config.target.name}",
            "source": f"logits/{_model(model).name}",
        },
        settings=lambda config, model: {"align": config.align.result_settings()},
        build=_align_stage,
        section=lambda config: config.align,
    ),
    StageSpec(
        name="fuse",
        version=FUSE_VERSION,
        models=lambda config: (),
        inputs=_fuse_inputs,
        settings=lambda config, model: {
            "fuse": config.fuse.result_settings(),
            "candidates": [model.name for model in config.models],  # `chosen` counts them, and ties go by their order
        },
        build=_fuse_stage,
        section=lambda config: config.fuse,
    ),
)
"""The order in which the stages run."""


def stage_spec(name: str) -> StageSpec:
    """The row of a stage."""
    return next(spec for spec in STAGES if spec.name == name)
