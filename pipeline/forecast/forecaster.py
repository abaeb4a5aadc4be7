"""``ptafuse plan``: done and remaining steps of a configuration, with reasons and costs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.forecast.changes import others_by_closeness, setting_changes
from pipeline.forecast.estimate import (
    Assumed,
    Cost,
    Sizes,
    cost_of,
)
from pipeline.forecast.machines import attention_warnings, idle_gpu_warnings
from pipeline.forecast.sizes import Parameters, measure_sizes
from pipeline.forecast.stage_costs import STAGE_COSTS, Outlook
from pipeline.run.outcomes import read_training_log, training_seconds
from pipeline.run.records import recorded_steps
from pipeline.run.rollup import DoneShard, FiguresReader
from pipeline.run.shard_plan import read_plan
from pipeline.run.stage_table import adapted_source, job_stage, sharded_stage
from pipeline.run.steps import ResolvedRun, Step, result_key
from pipeline.run.warnings import expected_warnings, shard_warnings
from pipeline.settings.run import RunConfig
from pipeline.state.status import StatusReader, StepStatus
from stages.contract.store import Store

NEVER = "pending, never computed here"
"""Why a step is not done of which the run directory holds no result, of any configuration."""


@dataclass(frozen=True)
class Work:
    """Amount of work of a step, and its cost.

    Attributes:
        num_tokens: number of tokens in total.
        num_tokens_left: number of tokens that are not done yet.
        num_bytes: size of the step's files when it is done.
        left: cost of the remaining part.
        spent: cost of the part that is done.
        basis: origin of ``left``, in words; empty if nothing is left.
    """

    num_tokens: float
    num_tokens_left: float
    num_bytes: float
    left: Cost
    spent: Cost
    basis: str


@dataclass(frozen=True)
class StepForecast:
    """State and work of one step.

    Attributes:
        key: the step.
        fingerprint: fingerprint of its folder.
        state: ``stale``: nothing is done, and there are results of an earlier version of this configuration.
        why: reasons why it is not done.
        num_shards: None: not known yet, or a step without shards.
        num_done: shards that are done.
        work: amount of work, and its cost.
    """

    key: str
    fingerprint: str
    state: Literal["done", "pending", "stale"]
    why: tuple[str, ...]
    num_shards: int | None
    num_done: int
    work: Work


@dataclass(frozen=True)
class Forecast:
    """Forecast of a whole configuration.

    Attributes:
        config: the configuration.
        url: URL of the run directory.
        sizes: amount of text.
        parameters: number of parameters of the models that were looked up, and where it is from.
        steps: steps, in their order.
        assumptions: names of the assumptions that were used.
        warnings: problems to expect from the documents (none to evaluate on), models without fast attention, and GPUs of the
            machines that stay idle.
    """

    config: RunConfig
    url: str
    sizes: Sizes
    parameters: Mapping[str, Parameters]
    steps: tuple[StepForecast, ...]
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def left(self) -> Cost:
        """Cost of what all steps have left."""
        return sum((step.work.left for step in self.steps), Cost())

    @property
    def num_bytes(self) -> float:
        """Bytes of all files when everything is done."""
        return sum(step.work.num_bytes for step in self.steps)


def forecast(resolved: ResolvedRun, store: Store) -> Forecast:
    """Forecast a configuration against a run directory. Reads storage only, records and fetches nothing.

    Raises:
        ValueError: the size of the dataset or of a model is needed and unknown; says what to set.
    """
    forecaster = _Forecaster(resolved, store)
    # In their order: resolve() makes them in it.
    steps = tuple(forecaster.forecast_step(step) for step in resolved.steps.values())
    outlook = forecaster.outlook
    used = tuple(sorted(outlook.assumed.used))
    config = resolved.config
    warnings = (*forecaster.document_warnings(), *attention_warnings(config), *idle_gpu_warnings(config))
    return Forecast(config, store.url, outlook.sizes, outlook.parameters, steps, used, warnings)


class _Forecaster:
    """Forecaster of the steps in the order of the pipeline, since a step's tokens follow from those before it."""

    def __init__(self, resolved: ResolvedRun, store: Store) -> None:
        self._resolved = resolved
        self._config = resolved.config
        self._store = store
        self._status = {step.key: step for step in StatusReader(resolved, store).read().steps}
        self._earlier = recorded_steps(store)
        self._figures = FiguresReader(store)
        assumed = Assumed(self._config.assumptions)
        plan = read_plan(store, resolved.steps["shard"].folder)
        sizes = measure_sizes(self._config, plan, self._status["shard"], assumed)
        self._num_shards = plan.num_shards if plan else None
        if plan is None and sizes.num_documents is not None:
            self._num_shards = math.ceil(sizes.num_documents / self._config.shard.documents_per_shard)
        self.outlook = Outlook(self._config, sizes, assumed)

    def forecast_step(self, step: Step) -> StepForecast:
        """Forecast one step, after those before it."""
        status = self._status[step.key]
        other = None if status.is_done or status.shards else self._other_results(step)
        if step.is_sharded:
            work = self._sharded_work(step, status, other and other[1])
        elif job_stage(step.stage).keeps_log:
            work = self._logged_work(step, status, other and other[1])
        else:
            work = self._assumed_work(step, status)
        self.outlook.tokens[step.key] = work.num_tokens
        return StepForecast(
            key=step.key,
            fingerprint=step.fingerprint,
            state=_state(status, other, self._config.name),
            why=self._why(step, status, other),
            num_shards=self._num_shards if step.is_sharded else None,
            num_done=len(status.shards),
            work=work,
        )

    def document_warnings(self) -> list[str]:
        """Return the warnings about the documents: from finished shards, else from what is to be expected."""
        shard = self._status["shard"]
        if shard.is_done:
            return shard_warnings(self._config, shard.health)
        return expected_warnings(self._config, self.outlook.sizes.num_documents)

    # --- why ---------------------------------------------------------------------------------------------------------

    def _other_results(self, step: Step) -> tuple[str, Step] | None:
        """Find the closest version of a step under another fingerprint that has results, and its configuration's name."""
        names = {other.fingerprint: name for name, other in self._earlier if other.key == step.key}
        own_fingerprints = {other.fingerprint for name, other in self._earlier if name == self._config.name}
        for other in others_by_closeness(step, [other for _, other in self._earlier]):
            if step.is_sharded:
                has_results = bool(self._figures.read(other.folder).shards)
            else:
                has_results = self._store.exists(result_key(other))
            if has_results:
                return (self._config.name if other.fingerprint in own_fingerprints else names[other.fingerprint]), other
        return None

    def _why(self, step: Step, status: StepStatus, other: tuple[str, Step] | None) -> tuple[str, ...]:
        if status.is_done:
            return ()
        lines = []
        if status.shards:
            lines.append(f"{len(status.shards)} of {status.num_shards} shards are done")
        elif status.training:
            lines.append(f"{status.training['step']} of {status.training['num_steps']} steps are done")
        elif other is None:
            lines.append(NEVER)
        else:
            name, before = other
            changes = setting_changes(before.settings, step.settings)
            lines.append(f"there is {before.fingerprint} of {name}, with other settings: {'; '.join(changes)}")
        if status.failed:
            lines.append(f"{len(status.failed)} shards failed: `ptafuse retry {self._store.url}` allows further tries")
        return tuple(lines)

    # --- what it takes -----------------------------------------------------------------------------------------------

    def _sharded_work(self, step: Step, status: StepStatus, other: Step | None) -> Work:
        """Estimate from the shards that are done, here or under other settings, else from the assumptions."""
        assumed, shards = STAGE_COSTS[step.stage], status.shards
        if shards and self._num_shards:
            tokens = status.num_tokens * self._num_shards / len(shards)
        else:
            tokens = assumed.tokens(self.outlook, step)
        left = 0.0 if status.is_done else tokens - status.num_tokens
        known = shards or (self._figures.read(other.folder).shards if other and _has_same_rate(step, other) else {})
        known_tokens = sum(done.num_tokens for done in known.values())
        if known_tokens:
            ratio = left / known_tokens
            cost = self._cost_of(step, known) * ratio
            num_bytes = sum(done.num_bytes for done in known.values()) * ratio
            basis = f"measured: {len(known)} shards" + (f" of {other.fingerprint}" if other and not shards else "")
        else:
            cost = assumed.cost(self.outlook, step, left) if left else Cost()
            num_bytes = assumed.num_bytes(self.outlook, step, left) if left else 0.0
            basis = "assumed"
        done_bytes = sum(done.num_bytes for done in shards.values())
        return Work(tokens, left, done_bytes + num_bytes, cost, self._cost_of(step, shards), basis if left else "")

    def _cost_of(self, step: Step, shards: Mapping[int, DoneShard]) -> Cost:
        """Sum the cost of done shards; manifests without CPUs and GPUs count as computed by workers as configured now."""
        resources = sharded_stage(step.stage).resources(self._config, step.model)
        total = Cost()
        for done in shards.values():
            cpus = resources.cpus if done.cpus is None else done.cpus
            gpus = (resources.gpus or 0.0) if done.gpus is None else done.gpus
            total += cost_of(done.seconds, cpus=cpus, gpus=gpus)
        return total

    def _logged_work(self, step: Step, status: StepStatus, other: Step | None) -> Work:
        """Estimate training from its log, or that of a training under other settings, else from the assumptions."""
        assumed, train = STAGE_COSTS[step.stage], self._config.train
        tokens = assumed.tokens(self.outlook, step)
        record = status.training
        share = 0.0 if status.is_done else 1 - record["step"] / record["num_steps"] if record else 1.0
        model = self._config.target if step.model is None else adapted_source(self._config, step.model)[0]
        gpus = float(self.outlook.on_gpu(model, train.device))
        spent_seconds, spent_tokens = training_seconds(read_training_log(step, self._store))
        seconds, known = spent_seconds, spent_tokens
        if not known and other is not None and _has_same_rate(step, other):
            seconds, known = training_seconds(read_training_log(other, self._store))
        left = tokens * share
        if known:
            cost = cost_of(seconds, cpus=train.cpus_per_worker, gpus=gpus) * (left / known)
            basis = f"measured: {known:,} tokens" + (f" of {other.fingerprint}" if other and not spent_tokens else "")
        else:
            cost, basis = assumed.cost(self.outlook, step, left) if left else Cost(), "assumed"
        num_bytes = assumed.num_bytes(self.outlook, step, tokens)
        spent = cost_of(spent_seconds, cpus=train.cpus_per_worker, gpus=gpus)
        return Work(tokens, left, num_bytes, cost, spent, basis if share else "")

    def _assumed_work(self, step: Step, status: StepStatus) -> Work:
        """Estimate only from the assumptions: a result says how long it took, but not on which machine."""
        assumed = STAGE_COSTS[step.stage]
        tokens = assumed.tokens(self.outlook, step)
        if status.is_done:
            return Work(tokens, 0.0, 0.0, Cost(), Cost(), "")
        num_bytes = assumed.num_bytes(self.outlook, step, tokens)
        return Work(tokens, tokens, num_bytes, assumed.cost(self.outlook, step, tokens), Cost(), "assumed")


def _has_same_rate(step: Step, other: Step | None) -> bool:
    """Return whether another configuration's results predict this step's speed.

    If models run, they do so only with the same weights.
    """
    return other is not None and step.settings.get("weights") == other.settings.get("weights")


def _state(status: StepStatus, other: tuple[str, Step] | None, config_name: str) -> Literal["done", "pending", "stale"]:
    if status.is_done:
        return "done"
    return "stale" if other is not None and other[0] == config_name else "pending"
