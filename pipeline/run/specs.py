"""Kinds of row of the stage table: what the pipeline asks of a stage, and what each answer means.

A *step* is one folder of the run directory: a stage, and its model where the stage runs once per model. A stage is sharded
(a step computes one file per shard: ``ShardedStage``) or a job (a step computes one result: ``JobStage``).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.settings.run import RunConfig
from stages.contract.fingerprint import Settings
from stages.contract.manifest import HealthMetric
from stages.contract.stage import Stage
from stages.contract.store import ROW_GROUP_BYTES
from stages.models.config import ModelConfig
from stages.models.token_tables import TokenTables


@dataclass(frozen=True)
class Resources:
    """Resources that the workers of a step need.

    Attributes:
        num_workers: None: one per GPU where GPUs are used, else one per CPU slot (``models``: one).
        cpus: CPUs of each worker.
        gpus: GPUs of each worker; None: 1 if the cluster has a GPU, otherwise 0; a cluster that can grow refuses to guess.
        models: the workers load models: without GPUs one worker takes all the memory there is to give.
        shards_per_worker: shards that a worker computes at the same time where there are more than workers, see
            ``ShardedStage``.
    """

    num_workers: int | None
    cpus: float
    gpus: float | None
    models: bool = False
    shards_per_worker: int = 1


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """A row of the stage table.

    Where a function takes a name, that is the step's own: the model it runs for, or None where the stage has one step. An
    evaluation on another text than the held-out split is named by both, ``"gemma3/news"`` (``stage_table.model_and_text``).

    Attributes:
        name: the stage's name, its folder's and its command's.
        help: help text of its command.
        version: its algorithm version, part of the fingerprint.
        settings: the settings that shape a step's result, for its fingerprint and for people.
        inputs: input name, as the stage knows it -> key of the step that provides it.
        names: the names of its steps; None: it has one step, without a name.
        applies: whether a configuration has its steps at all.
        reads_kinds: whether it also reads the kinds of a shard's documents, as the input ``"kinds"``.
        identities: what else a step's result depends on: name -> hash of a model's files, say.
    """

    name: str
    help: str
    version: int
    settings: Callable[[RunConfig, str | None], dict[str, Any]]
    inputs: Callable[[RunConfig, str | None], Mapping[str, str]]
    names: Callable[[RunConfig], tuple[str, ...]] | None = None
    applies: Callable[[RunConfig], bool] = field(default=lambda config: True)
    reads_kinds: Callable[[RunConfig], bool] = field(default=lambda config: False)
    identities: Callable[[RunConfig, str | None], Mapping[str, str]] = field(default=lambda config, name: {})


@dataclass(frozen=True, kw_only=True)
class ShardedStage(StageSpec):
    """A stage that computes one file per shard.

    Attributes:
        build: the stage for one step, which may read the token tables of the run.
        section: the stage's own settings.
        reads_documents: it reads the dataset by the frozen plan, and has no other input.
        train_rows_only: the rows of held-out documents are left out of what it reads.
        runs_model: its workers run the step's model: they may need GPUs, and the model's files must be those that the
            fingerprint names.
        tokenizers: the models whose tokenizers split text in a step: they are checked before any worker starts.
        can_be_shared: ``logits_from`` takes up its finished shards from another run directory.
        distribution: name of its rows in teacher tables, if they are distributions over the target's tokens.
        choices: settings of its section that are "auto" and change results -> what they come to on this machine.
        row_group_bytes: size of a row group of its files in memory: large where they are read whole, small where single
            rows are.
        shards_per_worker: shards that a worker computes at the same time, each in a separate thread. Above 1 for a stage
            whose ``run`` lets one thread at a time use the model: the others read, tokenize, encode and upload meanwhile.
            The worker holds the tables of that many shards.
    """

    build: Callable[[RunConfig, str | None, TokenTables], Stage]
    section: Callable[[RunConfig], Settings]
    reads_documents: bool = False
    train_rows_only: bool = False
    runs_model: bool = False
    tokenizers: Callable[[RunConfig, str | None], tuple[ModelConfig, ...]] = field(default=lambda config, name: ())
    can_be_shared: bool = False
    distribution: str | None = None
    choices: Callable[[RunConfig, str | None], Mapping[str, str]] = field(default=lambda config, name: {})
    row_group_bytes: int = ROW_GROUP_BYTES
    shards_per_worker: int = 1

    def resources(self, config: RunConfig, name: str | None) -> Resources:
        """Return what the workers of a step need, from the stage's settings."""
        section: Any = self.section(config)
        if not self.runs_model:
            return Resources(section.num_workers, section.cpus_per_worker, 0, shards_per_worker=self.shards_per_worker)
        if config.logits_of(name).backend == "server":
            return Resources(
                section.num_workers or 1, section.cpus_per_worker, 0, shards_per_worker=self.shards_per_worker
            )
        gpus = 0 if section.device == "cpu" else section.gpus_per_worker
        if gpus is None and (section.device == "cuda" or section.tensor_parallel_size > 1):
            gpus = section.tensor_parallel_size
        return Resources(
            section.num_workers,
            section.cpus_per_worker,
            gpus,
            models=True,
            shards_per_worker=self.shards_per_worker,
        )

    def max_bad_fraction(self, config: RunConfig) -> float:
        """Return the share of bad records above which a shard fails; fuse allows none."""
        return float(getattr(self.section(config), "max_bad_fraction", 0.0))


@dataclass(frozen=True, kw_only=True)
class JobStage(StageSpec):
    """A stage that computes one result per step.

    Attributes:
        result: the file in a step's folder that is written last: the proof that the step is done.
        is_table: the stages that read the step get a table, the ``rows`` of its result, which is JSON; else they get the models
            in its folders, one for each fold of the shards (``adapt``).
        metrics: function from its result to what ``status`` shows of it; None: nothing.
        keeps_log: a step logs its progress (``outcomes.read_training_log``).
    """

    result: str
    is_table: bool = False
    metrics: Callable[[Mapping[str, Any]], dict[str, HealthMetric]] | None = None
    keeps_log: bool = False
