"""``ptafuse plan``: what of a configuration is done, what is left and why, and what that will take."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.forecast.changes import others_by_closeness, setting_changes
from pipeline.forecast.estimate import (
    Assumed,
    Cost,
    Sizes,
    align_cost,
    cost_of,
    forward_cost,
    fuse_cost,
    shard_bytes,
    shard_cost,
    topk_bytes,
    train_bytes,
    train_cost,
)
from pipeline.forecast.sizes import Parameters, count_parameters, measure_sizes
from pipeline.run.outcomes import read_training_log, training_seconds
from pipeline.run.records import recorded_steps
from pipeline.run.rollup import DoneShard, FiguresReader
from pipeline.run.shard_plan import read_plan
from pipeline.run.stage_table import stage_spec
from pipeline.run.steps import FUSED, ResolvedRun, Step, result_key
from pipeline.settings.baselines import ENSEMBLE, WEIGHT_AVERAGE
from pipeline.settings.run import RunConfig
from pipeline.state.status import StatusReader, StepStatus
from stages.contract.store import Store
from stages.models.config import ModelConfig

NEVER = "pending, never computed here"
"""Why a step is not done of which the run directory holds no result, of any configuration."""


@dataclass(frozen=True)
class Work:
    """What a step goes through, and what that takes.

    Attributes:
        num_tokens: in all.
        num_tokens_left: of these, those still to do.
        num_bytes: of the step's files when it is done.
        left: what it will still take.
        spent: what its done part took.
        basis: what ``left`` is reckoned from, in words; empty where nothing is left.
    """

    num_tokens: float
    num_tokens_left: float
    num_bytes: float
    left: Cost
    spent: Cost
    basis: str


@dataclass(frozen=True)
class StepPlan:
    """One step of a plan.

    Attributes:
        key: the step.
        fingerprint: of its folder.
        state: ``stale``: nothing is done, and there are results of an earlier version of this configuration.
        why: why it is not done.
        num_shards: None: not known yet, or a step without shards.
        num_done: shards that are done.
        work: what it takes.
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
    """A plan of a whole configuration.

    Attributes:
        config: the configuration.
        url: of the run directory.
        sizes: how much text there is.
        parameters: of the models that were asked for, and how they are known.
        steps: in their order.
        assumptions: names of the assumptions that were used.
    """

    config: RunConfig
    url: str
    sizes: Sizes
    parameters: Mapping[str, Parameters]
    steps: tuple[StepPlan, ...]
    assumptions: tuple[str, ...]

    @property
    def left(self) -> Cost:
        """What all steps will still take."""
        return sum((step.work.left for step in self.steps), Cost())

    @property
    def num_bytes(self) -> float:
        """Of all files when everything is done."""
        return sum(step.work.num_bytes for step in self.steps)


def forecast(resolved: ResolvedRun, store: Store) -> Forecast:
    """Plan a configuration against a run directory. Reads storage only, records and fetches nothing.

    Raises:
        ValueError: the size of the dataset or of a model that is needed is not known; says what to set.
    """
    planner = _Planner(resolved, store)
    steps = tuple(planner.plan(step) for step in resolved.steps.values())  # in their order: resolve() makes them in it
    used = tuple(sorted(planner.assumed.used))
    return Forecast(resolved.config, store.url, planner.sizes, planner.parameters, steps, used)


class _Planner:
    """Plans step after step, in the order of the pipeline: a step's tokens follow from those before it."""

    def __init__(self, resolved: ResolvedRun, store: Store) -> None:
        self._resolved = resolved
        self._config = resolved.config
        self._store = store
        self._status = {step.key: step for step in StatusReader(resolved, store).read().steps}
        self._earlier = recorded_steps(store)
        self._figures = FiguresReader(store)
        self._tokens: dict[str, float] = {}
        self.assumed = Assumed(self._config.assumptions)
        self.parameters: dict[str, Parameters] = {}
        plan = read_plan(store, resolved.steps["shard"].folder)
        self.sizes = measure_sizes(self._config, plan, self._status["shard"], self.assumed)
        self._num_shards = plan.num_shards if plan else None
        if plan is None and self.sizes.num_documents is not None:
            self._num_shards = math.ceil(self.sizes.num_documents / self._config.shard.documents_per_shard)

    def plan(self, step: Step) -> StepPlan:
        """Plan one step; those before it were planned."""
        status = self._status[step.key]
        other = None if status.is_done or status.shards else self._other_results(step)
        stages = {"train": self._train_work, "eval": self._eval_work}
        work = stages.get(step.stage, self._shard_work)(step, status, other and other[1])
        self._tokens[step.key] = work.num_tokens
        return StepPlan(
            key=step.key,
            fingerprint=step.fingerprint,
            state=_state(status, other, self._config.name),
            why=self._why(step, status, other),
            num_shards=None if step.stage in stages else self._num_shards,
            num_done=len(status.shards),
            work=work,
        )

    # --- why ---------------------------------------------------------------------------------------------------------

    def _other_results(self, step: Step) -> tuple[str, Step] | None:
        """The same step under another fingerprint that has results here: the closest one, and its configuration's name."""
        names = {other.fingerprint: name for name, other in self._earlier if other.key == step.key}
        own = {other.fingerprint for name, other in self._earlier if name == self._config.name}
        for other in others_by_closeness(step, [other for _, other in self._earlier]):
            proofs = {"train": f"{other.folder}/manifest.json", "eval": result_key(other)}
            if step.stage in proofs:
                has_results = self._store.exists(proofs[step.stage])
            else:
                has_results = bool(self._figures.read(other.folder).shards)
            if has_results:
                return (self._config.name if other.fingerprint in own else names[other.fingerprint]), other
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

    def _shard_work(self, step: Step, status: StepStatus, other: Step | None) -> Work:
        shards = status.shards
        if shards and self._num_shards:
            tokens = status.num_tokens * self._num_shards / len(shards)
        else:
            tokens = self._expected_tokens(step)
        left = 0.0 if status.is_done else tokens - status.num_tokens
        known = shards or (self._figures.read(other.folder).shards if other and _has_same_rate(step, other) else {})
        known_tokens = sum(done.num_tokens for done in known.values())
        if known_tokens:
            part = left / known_tokens
            cost = self._cost_of(step, known) * part
            num_bytes = sum(done.num_bytes for done in known.values()) * part
            basis = f"measured: {len(known)} shards" + (f" of {other.fingerprint}" if other and not shards else "")
        else:
            cost, num_bytes, basis = self._assumed_cost(step, left), self._assumed_bytes(step, left), "assumed"
        done_bytes = sum(done.num_bytes for done in shards.values())
        return Work(tokens, left, done_bytes + num_bytes, cost, self._cost_of(step, shards), basis if left else "")

    def _expected_tokens(self, step: Step) -> float:
        """Tokens of a step of which nothing is done."""
        target = self._config.target.name
        if step.stage == "shard":
            return self.sizes.tokens[target]
        if step.stage == "logits":
            return self.sizes.tokens[str(step.model)] * self._config.shard.fraction_of("train")
        return self._tokens[f"logits/{target}"]

    def _cost_of(self, step: Step, shards: Mapping[int, DoneShard]) -> Cost:
        """What done shards took; a manifest that does not say on what is taken to be of workers as configured now."""
        resources = stage_spec(step.stage).resources(self._config)
        total = Cost()
        for done in shards.values():
            cpus = resources.cpus if done.cpus is None else done.cpus
            gpus = (resources.gpus or 0.0) if done.gpus is None else done.gpus
            total += cost_of(done.seconds, cpus=cpus, gpus=gpus)
        return total

    def _assumed_cost(self, step: Step, tokens: float) -> Cost:
        if not tokens:
            return Cost()
        if step.stage == "shard":
            return shard_cost(self.sizes.tokens.values(), self.assumed)
        if step.stage == "logits":
            return self._forward(self._model(step), tokens, self._config.logits.device)
        return (
            align_cost(tokens, self._config, self.assumed) if step.stage == "align" else fuse_cost(tokens, self.assumed)
        )

    def _assumed_bytes(self, step: Step, tokens: float) -> float:
        if not tokens:
            return 0.0
        if step.stage == "shard":
            return shard_bytes(self.sizes.text_bytes, self.assumed)
        top_k = {
            "logits": self._config.logits.top_k,
            "align": self._config.align.top_k,
            "fuse": self._config.fuse.top_k,
        }
        return topk_bytes(tokens, top_k[step.stage], self.assumed)

    def _train_work(self, step: Step, status: StepStatus, other: Step | None) -> Work:
        train = self._config.train
        tokens = self._tokens["fuse"] * train.num_epochs
        record = status.training
        share = 0.0 if status.is_done else 1 - record["step"] / record["num_steps"] if record else 1.0
        gpu = self._on_gpu(self._config.target, train.device)
        spent_seconds, spent_tokens = training_seconds(read_training_log(step, self._store))
        seconds, known = spent_seconds, spent_tokens
        if not known and other is not None and _has_same_rate(step, other):
            seconds, known = training_seconds(read_training_log(other, self._store))
        if known:
            cost = cost_of(seconds, cpus=train.cpus_per_worker, gpus=float(gpu)) * (tokens * share / known)
            basis = f"measured: {known:,} tokens" + (f" of {other.fingerprint}" if other and not spent_tokens else "")
        else:
            cost, basis = self._assumed_train_cost(tokens * share, gpu), "assumed"
        num_bytes = train_bytes(self._num_parameters(self._config.target), train.keep_checkpoints)
        spent = cost_of(spent_seconds, cpus=train.cpus_per_worker, gpus=float(gpu))
        return Work(tokens, tokens * share, num_bytes, cost, spent, basis if share else "")

    def _assumed_train_cost(self, tokens: float, gpu: bool) -> Cost:
        if not tokens:
            return Cost()
        parameters, train = self._num_parameters(self._config.target), self._config.train
        return train_cost(tokens, parameters, gpu=gpu, checkpointing=train.gradient_checkpointing, assumed=self.assumed)

    def _eval_work(self, step: Step, status: StepStatus, other: Step | None) -> Work:
        del other  # results say how long they took, not on what
        target = self._config.target
        if step.model == ENSEMBLE:
            models = (target, *self._config.models)  # the target's window first, then its full distributions
        else:
            models = (target if step.model in (FUSED, WEIGHT_AVERAGE) else self._model(step),)
        share = self._config.shard.fraction_of(self._config.eval.split)
        if self._config.eval.max_documents is not None and self.sizes.num_documents:
            share = min(share, self._config.eval.max_documents / self.sizes.num_documents)
        counts = [self.sizes.tokens[model.name] * share for model in models]
        if status.is_done:
            return Work(sum(counts), 0.0, 0.0, Cost(), Cost(), "")
        device = self._config.eval.device
        cost = sum((self._forward(*part, device) for part in zip(models, counts, strict=True)), Cost())
        return Work(sum(counts), sum(counts), 0.0, cost, Cost(), "assumed")

    def _forward(self, model: ModelConfig, tokens: float, device: str) -> Cost:
        gpu = self._on_gpu(model, device)
        return forward_cost(tokens, self._num_parameters(model), gpu=gpu, assumed=self.assumed)

    def _on_gpu(self, model: ModelConfig, device: str) -> bool:
        """Where a model will run; what "auto" will find cannot be known here."""
        if device != "auto":
            return device == "cuda"
        if self._config.logits.gpus_per_worker is not None:
            return self._config.logits.gpus_per_worker > 0
        return self._num_parameters(model) >= self.assumed.take("gpu_from_parameters")

    def _num_parameters(self, model: ModelConfig) -> float:
        if model.name not in self.parameters:
            self.parameters[model.name] = count_parameters(model, self.assumed)
        return self.parameters[model.name].count

    def _model(self, step: Step) -> ModelConfig:
        return next(model for model in self._config.models if model.name == step.model)


def _has_same_rate(step: Step, other: Step | None) -> bool:
    """Another configuration's results tell this step's speed: where models run, those of the same weights alone."""
    return other is not None and step.settings.get("weights") == other.settings.get("weights")


def _state(status: StepStatus, other: tuple[str, Step] | None, config_name: str) -> Literal["done", "pending", "stale"]:
    if status.is_done:
        return "done"
    return "stale" if other is not None and other[0] == config_name else "pending"
