"""Steps of a run: what is computed, from what, and in which folder."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.run.specs import ShardedStage
from pipeline.run.stage_table import job_stage, sharded_stage, stage_spec
from pipeline.settings.load import config_id
from pipeline.settings.run import RunConfig
from stages.contract.manifest import stage_folder


@dataclass(frozen=True)
class Request:
    """A configuration as the user asked for it: the file, and what was changed on the command line."""

    config_path: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One folder of the run directory: a stage, and its model if the stage runs once per model.

    Attributes:
        key: ``"logits/gemma3"``.
        stage: ``"logits"``.
        model: ``"gemma3"``, or None.
        fingerprint: names the folder.
        inputs: input name, as the stage knows it -> step key.
        settings: the readable settings behind the fingerprint, with the inputs' fingerprints.
        text: the text that a model is evaluated on; None for the held-out split, and for the other stages.
    """

    key: str
    stage: str
    model: str | None
    fingerprint: str
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]
    text: str | None = None

    @property
    def folder(self) -> str:
        """Folder of the step in the run directory."""
        return stage_folder(self.key, self.fingerprint)

    @property
    def is_sharded(self) -> bool:
        """Whether the step computes one file per shard."""
        return isinstance(stage_spec(self.stage), ShardedStage)


@dataclass(frozen=True)
class ResolvedRun:
    """A configuration with everything that names its results; recorded in the run directory for ``status``.

    Attributes:
        config: the configuration.
        steps: by their keys, in the order in which they run.
        request: configuration and overrides that the user typed.
        distinction: difference from other configurations with the same name, if reports show several.
    """

    config: RunConfig
    steps: Mapping[str, Step]
    request: Request
    distinction: str = ""

    @property
    def label(self) -> str:
        """Name in reports: the configuration's, and what distinguishes it from others of that name."""
        return f"{self.config.name} ({self.distinction})" if self.distinction else self.config.name

    def command(self, stage: str, run_url: str) -> str:
        """Return the command that runs a stage of this run, as the user would type it."""
        sets = "".join(f" --set {shlex.quote(override)}" for override in self.request.overrides)
        arguments = f" ARGS={shlex.quote(sets.strip())}" if sets else ""
        path, run_url = shlex.quote(self.request.config_path), shlex.quote(run_url)
        return (
            f"`make {stage} CONFIG={path} RUN={run_url}{arguments}` (or `ptafuse {stage} {path} --run {run_url}{sets}`)"
        )

    def of_stage(self, stage: str) -> list[Step]:
        """List the steps of one stage, in the order of the configuration's models."""
        return [step for step in self.steps.values() if step.stage == stage]

    @property
    def sharded_steps(self) -> list[Step]:
        """Steps that compute one file per shard, in order."""
        return [step for step in self.steps.values() if step.is_sharded]

    @property
    def fused_steps(self) -> list[Step]:
        """Sharded steps from the first model's logits to the fused distributions: all except the cutting of documents."""
        return [step for step in self.sharded_steps if not sharded_stage(step.stage).reads_documents]

    @property
    def record_key(self) -> str:
        """Key of the record of the resolved configuration."""
        return record_key(self.config)


def record_key(config: RunConfig) -> str:
    """Return where a configuration is recorded."""
    return f"configs/{config.name}-{config_id(config)}.json"


def result_key(step: Step) -> str:
    """Return the file that proves a job's step done: the training's manifest, or the figures of an evaluated model."""
    return f"{step.folder}/{job_stage(step.stage).result}"
