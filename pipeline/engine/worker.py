"""Compute one shard, from inputs to committed manifest, with the same code under Ray and in-process.

An attempt is recorded before it computes, so that a worker that dies (out of memory, a lost node) leaves a trace, and a
shard that kills every worker is refused after ``max_attempts`` instead of being retried forever.
"""

import json
import logging
import math
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.documents import read_documents
from pipeline.dataset.files import reading
from pipeline.engine.versions import library_versions
from pipeline.run.attempts import Attempt, read_attempts
from pipeline.run.session import kinds_table, result_rows
from pipeline.run.shard_plan import read_plan
from pipeline.run.stage_table import sharded_stage
from pipeline.run.steps import Step
from pipeline.run.trained_model import fetch_model
from pipeline.settings.adapt import fold_of
from pipeline.settings.run import RunConfig
from stages.contract import schemas
from stages.contract.busy_time import BusyTime
from stages.contract.digest import sha256
from stages.contract.filesystem import StoreError
from stages.contract.manifest import DataFile, InputRef, Manifest, choices_key, data_key, manifest_key, quarantine_key
from stages.contract.stage import Stage, StageOutput
from stages.contract.store import Store
from stages.contract.tracebacks import shows_tracebacks
from stages.models.config import ModelConfig
from stages.models.token_tables import TokenTables
from train.job import MANIFEST

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardJob:
    """Everything that a worker needs to compute shards of one step; small and picklable.

    Attributes:
        run_url: the run directory.
        config_json: the resolved configuration.
        step: step that is computed.
        input_folders: input name -> folder of the step that gives it, for the inputs that have one file per shard.
        shard_folder: folder of the shard stage, where the frozen plan is.
        num_shards: shards of the run.
        launch: identifies the command that started the job.
        max_attempts: attempts at a shard before it counts as failed.
        result_keys: input name -> key of the result that it is read from, for inputs that are the same for all shards.
        models: fold of the shards -> folder of the step that trained the model which computes them; empty: the step's own
            model computes all.
        cpus: CPUs that each worker has, for the manifest.
        gpus: GPUs that each worker has; None if only the runner knows.
    """

    run_url: str
    config_json: str
    step: Step
    input_folders: Mapping[str, str]
    shard_folder: str
    num_shards: int
    launch: str
    max_attempts: int
    result_keys: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    cpus: float | None = None
    gpus: float | None = None


@dataclass(frozen=True)
class ShardStatus:
    """Outcome of one shard.

    This is all that a worker returns to the driver, so keep it small: tables never cross the Ray boundary.
    """

    shard: int
    outcome: Literal["done", "already done", "failed"]
    num_tokens: int = 0
    seconds: float = 0.0
    attempt: int = 0
    message: str = ""


class TooManyBadRecordsError(ValueError):
    """Error of a shard of which more records went to quarantine than ``max_bad_fraction`` allows."""


class ShardWorker:
    """Worker that computes shards of one step: one after the other, or several at once, each in its own thread.

    Where a stage lets shards overlap (``ShardedStage.shards_per_worker``), one is in the model while the host's work for
    another is done. They share nothing but the loaded stage: each has its own attempt, tables and files, and one that fails
    leaves the others as they are.
    """

    def __init__(self, job: ShardJob) -> None:
        """Remember the job; the first shard that needs computing loads the models."""
        self._job = job
        self._store = Store(job.run_url)
        self._config = RunConfig.model_validate_json(job.config_json)
        self._spec = sharded_stage(job.step.stage)
        self._stage: Stage | None = None
        self._fold = ""
        self._setup_error = ""
        self._loading = threading.Lock()
        self._busy = BusyTime()
        # Guards the two fields below, and the change of folds.
        self._turns = threading.Condition()
        self._num_running = 0
        self._runs_alone = False

    def run(self, shard: int) -> ShardStatus:
        """Compute and commit a shard, or find that it is done. May be called from several threads, for different shards."""
        with self._turn(shard):
            return self._run(shard)

    @contextmanager
    def _turn(self, shard: int) -> Iterator[None]:
        """Wait until a shard may be computed in parallel with the running ones, and hold its place until it is done.

        A shard runs alone if a worker died on it before in this command. The attempt of its neighbour would be lost with the
        next death, and counted: a shard that kills its workers would make other shards fail. Shards of another fold wait too,
        until the loaded model is not used any more: only one fits in memory.
        """
        fold = fold_of(shard) if self._job.models else ""
        alone = self._spec.shards_per_worker > 1 and self._lost_a_worker(shard)
        with self._turns:
            self._turns.wait_for(
                lambda: not (self._runs_alone or (self._num_running and (alone or fold != self._fold)))
            )
            self._num_running += 1
            self._runs_alone = alone
            if fold != self._fold:
                self._stage, self._fold = None, fold
        try:
            yield
        finally:
            with self._turns:
                self._num_running -= 1
                self._runs_alone = False
                self._turns.notify_all()

    def _lost_a_worker(self, shard: int) -> bool:
        """Return whether an attempt at a shard began in this command and never ended."""
        records = read_attempts(self._store, self._job.step.folder, shard)
        return any(record["launch"] == self._job.launch and not record.get("error") for record in records)

    def _run(self, shard: int) -> ShardStatus:
        folder = self._job.step.folder
        reported = ""
        while True:
            done = self._store.read_manifest(folder, shard)  # a shard may be executed again after it was committed
            if done is not None:
                return ShardStatus(shard, "already done", done.num_tokens, 0.0, done.attempt)
            attempt = Attempt.begin(self._store, folder, shard, self._job.launch, self._job.max_attempts)
            if isinstance(attempt, str):
                return ShardStatus(shard, "failed", message=attempt)
            stage = self._loaded_stage()
            if stage is None:
                self._store.delete(attempt.key)  # no fault of this shard's
                return ShardStatus(shard, "failed", message=self._setup_error)
            try:
                return self._compute(stage, shard, attempt)
            except StoreError:  # no fault of this shard's: the command ends, and may simply be run again
                raise
            except Exception as error:  # the boundary of a shard: any failure is recorded and counted
                if shows_tracebacks():
                    log.exception("%s shard %d, attempt %d failed", self._job.step.key, shard, attempt.number)
                elif (failure := f"{type(error).__name__}: {error}") != reported:
                    log.warning("%s shard %d failed and is retried: %s", self._job.step.key, shard, error)
                    reported = failure  # an attempt that fails like the one before says nothing new
                attempt.fail(self._store, error)

    def _loaded_stage(self) -> Stage | None:
        """Return the stage with what it needs, loaded once; None, and why in ``_setup_error``, if that cannot be had."""
        with self._loading:
            if self._stage is None and not self._setup_error:
                self._set_up()
            return self._stage

    def _set_up(self) -> None:
        try:
            if self._job.gpus:  # before "auto" settings are resolved, for all workers, by what torch sees here
                _require_cuda(self._job.step.key)
            config = resolve_auto_settings(self._job, self._store, self._config)
            if self._fold:
                config = self._with_adapted_source(config)
            elif self._spec.runs_model:
                self._refuse_other_files(config.find_model(self._job.step.model))
            stage = self._spec.build(config, self._job.step.model, TokenTables(self._store))
            stage.setup()
        except Exception as error:  # the same boundary: no shard can be computed, and the user must learn why
            if shows_tracebacks():
                log.exception("%s: set-up failed", self._job.step.key)
            self._setup_error = f"set-up failed: {type(error).__name__}: {error}"
            return
        self._stage = stage

    def _with_adapted_source(self, config: RunConfig) -> RunConfig:
        """Return the configuration in which the model adapted for this fold replaces the step's own model."""
        folder = fetch_model(self._store, self._job.models[self._fold], config.engine.scratch)
        sources = tuple(
            source.model_copy(
                update={"hub": None, "revision": None, "path": folder, "tokenizer": source.tokenizer_files}
            )
            if source.name == self._job.step.model
            else source
            for source in config.sources
        )
        return config.model_copy(update={"sources": sources})

    def _refuse_other_files(self, model: ModelConfig) -> None:
        """Refuse model files other than those in the step's fingerprint: changed since, or different on this machine.

        Raises:
            ValueError: says which.
        """
        for kind, identity in (("weights", model.weights_identity()), ("tokenizer", model.tokenizer_identity())):
            if identity != self._job.step.settings[kind]:
                raise ValueError(
                    f"model {model.name}: the files of its {kind} on {socket.gethostname()} differ from those that the "
                    "command started with: they have changed since, or this machine has different ones; make them the "
                    "same everywhere and run the command again"
                )

    def _compute(self, stage: Stage, shard: int, attempt: "Attempt") -> ShardStatus:
        started = time.monotonic()
        tables, references = self._read_inputs(shard)
        beside = {"kinds", *self._job.result_keys}
        num_rows_in = max(table.num_rows for name, table in tables.items() if name not in beside)
        output = stage.run(tables)
        self._refuse_bad_shard(shard, output, num_rows_in)
        manifest = self._write(shard, attempt, output, references, num_rows_in, started)
        if self._store.create(manifest_key(self._job.step.folder, shard), manifest.to_bytes()):
            return ShardStatus(shard, "done", manifest.num_tokens, manifest.seconds, attempt.number)
        # Another attempt was faster: its files are the shard's, ours are removed.
        for file in (manifest.data, manifest.quarantine):
            if file is not None and self._store.is_local:
                # Not in an object store: if it has no conditional create, a delayed request may still publish our
                # manifest, which must find its data. `ptafuse gc` removes files that no manifest names.
                self._store.delete(file.key)
        return ShardStatus(shard, "already done", manifest.num_tokens, manifest.seconds, attempt.number)

    def _read_inputs(self, shard: int) -> tuple[dict[str, pa.Table], dict[str, InputRef]]:
        dataset = self._config.dataset
        if self._spec.reads_documents:
            plan = read_plan(self._store, self._job.shard_folder)
            assert plan is not None
            documents = reading(dataset, read_documents, dataset, plan.ranges[shard])
            identity = str(self._job.step.settings["inputs"]["dataset"])
            reference = InputRef(folder=self._job.shard_folder, manifest_sha256=plan.sha256, data_sha256=identity)
            return {"documents": documents}, {"plan": reference}
        tables, references = {}, {}
        folders = self._job.input_folders
        raws = {name: self._store.read(manifest_key(folder, shard)) for name, folder in folders.items()}
        manifests = {name: Manifest.from_bytes(raw) for name, raw in raws.items()}
        self._refuse_mixed(shard, {folders[name]: manifest for name, manifest in manifests.items()})
        for name, manifest in manifests.items():
            remake = f"`make {self._job.step.inputs[name].split('/', maxsplit=1)[0]}`"
            table = self._store.read_table(manifest.data, remake=remake)
            if self._spec.train_rows_only:
                table = table.filter(pc.equal(table["split"], "train"))
            tables[name] = table
            references[name] = InputRef(
                folder=folders[name], manifest_sha256=sha256(raws[name]), data_sha256=manifest.data.sha256
            )
        for name, key in self._job.result_keys.items():
            raw = self._store.read(key)
            tables[name] = result_rows(raw)
            references[name] = InputRef(
                folder=key.rsplit("/", 1)[0], manifest_sha256=sha256(raw), data_sha256=sha256(raw)
            )
        if self._fold:
            folder = self._job.models[self._fold]
            digest = sha256(self._store.read(f"{folder}/{MANIFEST}"))
            references[self._fold] = InputRef(folder=folder, manifest_sha256=digest, data_sha256=digest)
        if self._spec.reads_kinds(self._config):
            plan = read_plan(self._store, self._job.shard_folder)
            assert plan is not None
            tables["kinds"] = reading(dataset, kinds_table, dataset, plan.ranges[shard])
        return tables, references

    def _refuse_mixed(self, shard: int, manifests: Mapping[str, Manifest]) -> None:
        """Refuse inputs that were computed from different versions of one shard, as two racing attempts can leave them.

        Args:
            shard: the shard.
            manifests: folder of each input -> its manifest.

        Raises:
            ValueError: names the two.
        """
        versions = {folder: manifest.data.sha256 for folder, manifest in manifests.items()}
        for folder, manifest in manifests.items():
            for name, reference in manifest.inputs.items():
                if name == "plan":
                    continue
                if versions.setdefault(reference.folder, reference.data_sha256) != reference.data_sha256:
                    raise ValueError(
                        f"{folder} shard {shard} was computed from another version of {reference.folder} than the other "
                        f"inputs of {self._job.step.key}: run `ptafuse verify {self._store.url} --repair`, then `make "
                        f"{folder.split('/', maxsplit=1)[0]}`"
                    )

    def _refuse_bad_shard(self, shard: int, output: StageOutput, num_rows_in: int) -> None:
        allowed = self._spec.max_bad_fraction(self._config)
        if len(output.quarantine) > allowed * num_rows_in:
            first = output.quarantine[0]
            setting = f"{self._spec.name}.max_bad_fraction"
            reasons = Counter(record.error for record in output.quarantine)
            counts = ", ".join(f"{count} {error}" for error, count in sorted(reasons.items(), key=_by_count))
            enough = math.ceil(100 * len(output.quarantine) / num_rows_in) / 100
            raise TooManyBadRecordsError(
                f"{len(output.quarantine)} of {num_rows_in} records of {self._job.step.key} shard {shard} are bad, "
                f"more than {setting} = {allowed} allows: {counts}. The first one: document "
                f"{first.doc_id}, segment {first.segment}: "
                f"{first.error}: {first.message}. Correct the records, or exclude them: set {setting} to "
                f"{enough:g}, or more for other shards"
            )

    def _write(
        self,
        shard: int,
        attempt: "Attempt",
        output: StageOutput,
        references: dict[str, InputRef],
        num_rows_in: int,
        started: float,
    ) -> Manifest:
        step, num_shards = self._job.step, self._job.num_shards
        key = data_key(step.folder, shard, num_shards, attempt.name)
        data = self._store.write_table(key, output.table, row_group_bytes=self._spec.row_group_bytes)
        quarantine: DataFile | None = None
        if output.quarantine:
            key = quarantine_key(step.folder, shard, attempt.name)
            quarantine = self._store.write_table(key, _quarantine_table(step.key, output))
        return Manifest(
            stage=step.key,
            shard=shard,
            num_shards=num_shards,
            fingerprint=step.fingerprint,
            settings=dict(step.settings),
            inputs=references,
            data=data,
            quarantine=quarantine,
            num_rows_in=num_rows_in,
            num_rows_out=output.table.num_rows,
            num_quarantined=len(output.quarantine),
            num_tokens=output.num_tokens,
            health=dict(output.health),
            seconds=round(self._busy.finish(started), 3),
            cpus=self._job.cpus,
            gpus=self._job.gpus,
            attempt=attempt.number,
            host=socket.gethostname(),
            versions={**library_versions(), **output.versions},
        )


def _require_cuda(step: str) -> None:
    from stages.models.devices import require_cuda  # torch takes seconds to import

    require_cuda(step)


def resolve_auto_settings(job: ShardJob, store: Store, config: RunConfig) -> RunConfig:
    """Replace a step's "auto" settings by the values that the first worker of its folder found.

    Workers on other machines, and later commands, might choose differently, and one folder would mix the results of two
    computations. So the first worker records its values in the folder, and all others use them, or fail in ``setup``.
    """
    spec = sharded_stage(job.step.stage)
    choices = spec.choices(config, job.step.model)
    if not choices:
        return config
    key = choices_key(job.step.folder)
    store.create(key, json.dumps(choices).encode())
    recorded = json.loads(store.read(key))
    for name, value in recorded.items():
        if choices.get(name) != value:
            log.warning(
                "%s: %s is %r in this folder; here auto would be %r", job.step.key, name, value, choices.get(name)
            )
    return config.model_copy(update={spec.name: spec.section(config).model_copy(update=recorded)})


def _by_count(reason: tuple[str, int]) -> tuple[int, str]:
    """Order the reasons of quarantine: the most frequent first, equal ones by name."""
    name, count = reason
    return -count, name


def _quarantine_table(step: str, output: StageOutput) -> pa.Table:
    records = output.quarantine
    columns = {
        "doc_id": [record.doc_id for record in records],
        "segment": [record.segment for record in records],
        "stage": [step] * len(records),
        "error": [record.error for record in records],
        "message": [record.message for record in records],
    }
    return pa.table(columns, schema=schemas.QUARANTINE)
