"""Tokens, cost and output size of each stage, for steps that the run has not measured yet."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from pipeline.forecast.estimate import (
    Assumed,
    Cost,
    Sizes,
    align_cost,
    forward_cost,
    fuse_cost,
    shard_bytes,
    shard_cost,
    topk_bytes,
    train_bytes,
    train_cost,
)
from pipeline.forecast.machines import is_eager_only
from pipeline.forecast.sizes import Parameters, count_parameters, evaluated_text_bytes
from pipeline.run.stage_table import FUSED, adapted_source
from pipeline.run.steps import Step
from pipeline.settings.adapt import FOLDS
from pipeline.settings.baselines import ENSEMBLE, WEIGHT_AVERAGE
from pipeline.settings.run import RunConfig
from stages.models.config import ModelConfig


@dataclass
class Outlook:
    """Known and assumed facts about a run, from which the costs of its steps follow.

    Attributes:
        config: the configuration.
        sizes: amount of text.
        assumed: the assumptions.
        tokens: step key -> tokens that the step goes through, of the steps planned so far.
        parameters: model -> its parameters, of the models that were asked for.
        text_bytes: text -> bytes of it that are scored, of the texts that were asked for.
    """

    config: RunConfig
    sizes: Sizes
    assumed: Assumed
    tokens: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, Parameters] = field(default_factory=dict)
    text_bytes: dict[str, float] = field(default_factory=dict)

    def target_tokens(self) -> float:
        """Return the tokens of the target's logits, which align and fuse go through as well."""
        return self.tokens[f"logits/{self.config.target.name}"]

    def forward(self, model: ModelConfig, tokens: float, device: str) -> Cost:
        """Estimate the cost of a model's forward pass over a number of tokens."""
        gpu = self.on_gpu(model, device)
        eager = is_eager_only(model)
        return forward_cost(tokens, self.num_parameters(model), gpu=gpu, eager=eager, assumed=self.assumed)

    def on_gpu(self, model: ModelConfig, device: str) -> bool:
        """Return whether a model will run on a GPU; what "auto" will choose is assumed."""
        if device != "auto":
            return device == "cuda"
        if self.config.logits.gpus_per_worker is not None:
            return self.config.logits.gpus_per_worker > 0
        return self.num_parameters(model) >= self.assumed.take("gpu_from_parameters")

    def text_tokens(self, text: str, model: ModelConfig) -> float:
        """Return the number of a model's tokens in an additional text, with as many bytes per token as in the dataset."""
        if text not in self.text_bytes:
            self.text_bytes[text] = evaluated_text_bytes(self.config.eval.find_text(text), self.assumed)
        return self.text_bytes[text] * self.sizes.tokens[model.name] / self.sizes.text_bytes

    def num_parameters(self, model: ModelConfig) -> float:
        """Return a model's parameters, and remember how they are known."""
        if model.name not in self.parameters:
            self.parameters[model.name] = count_parameters(model, self.assumed)
        return self.parameters[model.name].count


@dataclass(frozen=True)
class StageCost:
    """Costs of a stage by the assumptions.

    Attributes:
        tokens: number of tokens that a step processes, over all shards.
        cost: cost of a number of tokens above 0.
        num_bytes: size of the files written for a number of tokens above 0.
    """

    tokens: Callable[[Outlook, Step], float]
    cost: Callable[[Outlook, Step, float], Cost]
    num_bytes: Callable[[Outlook, Step, float], float]


def _logits_tokens(outlook: Outlook, step: Step) -> float:
    return outlook.sizes.tokens[str(step.model)] * outlook.config.shard.fraction_of("train")


def _adapt_tokens(outlook: Outlook, step: Step) -> float:
    source, _ = adapted_source(outlook.config, step.model)
    assert source.adapt is not None
    share = outlook.config.shard.fraction_of("train") / len(FOLDS)
    return outlook.sizes.tokens[source.name] * share * source.adapt.num_epochs


def _adapt_cost(outlook: Outlook, step: Step, tokens: float) -> Cost:
    source, _ = adapted_source(outlook.config, step.model)
    return _training_cost(outlook, source, tokens)


def _fit_tokens(outlook: Outlook, step: Step) -> float:
    """Return the tokens of the shards that weights are fitted on."""
    del step
    tokens, documents = outlook.target_tokens(), outlook.sizes.num_documents
    if documents is None:
        return tokens
    num_shards = max(1, -(-documents // outlook.config.shard.documents_per_shard))
    return tokens * min(1.0, outlook.config.fuse.fit_shards / num_shards)


def _train_cost(outlook: Outlook, step: Step, tokens: float) -> Cost:
    del step
    return _training_cost(outlook, outlook.config.target, tokens)


def _training_cost(outlook: Outlook, model: ModelConfig, tokens: float) -> Cost:
    train = outlook.config.train
    return train_cost(
        tokens,
        outlook.num_parameters(model),
        gpu=outlook.on_gpu(model, train.device),
        checkpointing=train.gradient_checkpointing,
        eager=is_eager_only(model),
        assumed=outlook.assumed,
    )


def _evaluated_tokens(outlook: Outlook, step: Step) -> list[tuple[ModelConfig, float]]:
    """Return the models that run in an evaluation, each with the tokens it goes through."""
    config = outlook.config
    if step.model == ENSEMBLE:
        models = (config.target, *config.models)  # the target's window first, then its full distributions
    else:
        models = (config.target if step.model in (FUSED, WEIGHT_AVERAGE) else config.find_model(step.model),)
    if step.text is not None:
        return [(model, outlook.text_tokens(step.text, model)) for model in models]
    share = config.shard.fraction_of(config.eval.split)
    if config.eval.max_documents is not None and outlook.sizes.num_documents:
        share = min(share, config.eval.max_documents / outlook.sizes.num_documents)
    return [(model, outlook.sizes.tokens[model.name] * share) for model in models]


def _eval_cost(outlook: Outlook, step: Step, tokens: float) -> Cost:
    del tokens  # each model has its own
    device = outlook.config.eval.device
    return sum((outlook.forward(*work, device) for work in _evaluated_tokens(outlook, step)), Cost())


STAGE_COSTS: Final[dict[str, StageCost]] = {
    "shard": StageCost(
        tokens=lambda outlook, step: outlook.sizes.tokens[outlook.config.target.name],
        cost=lambda outlook, step, tokens: shard_cost(outlook.sizes.tokens.values(), outlook.assumed),
        num_bytes=lambda outlook, step, tokens: shard_bytes(outlook.sizes.text_bytes, outlook.assumed),
    ),
    "adapt": StageCost(
        tokens=_adapt_tokens,
        cost=_adapt_cost,
        num_bytes=lambda outlook, step, tokens: train_bytes(
            outlook.num_parameters(adapted_source(outlook.config, step.model)[0]), outlook.config.train.keep_checkpoints
        ),
    ),
    "logits": StageCost(
        tokens=_logits_tokens,
        cost=lambda outlook, step, tokens: outlook.forward(
            outlook.config.find_model(step.model), tokens, outlook.config.logits.device
        ),
        num_bytes=lambda outlook, step, tokens: topk_bytes(
            # A draw is an id without a logprob.
            tokens,
            outlook.config.logits.top_k + outlook.config.logits.tail_samples / 2,
            outlook.assumed,
        ),
    ),
    "align": StageCost(
        tokens=lambda outlook, step: outlook.target_tokens(),
        cost=lambda outlook, step, tokens: align_cost(tokens, outlook.config, outlook.assumed),
        num_bytes=lambda outlook, step, tokens: topk_bytes(
            tokens, outlook.config.align.top_k + outlook.config.logits.tail_samples, outlook.assumed
        ),
    ),
    "fit": StageCost(
        tokens=_fit_tokens,
        cost=lambda outlook, step, tokens: fuse_cost(tokens, outlook.assumed),
        num_bytes=lambda outlook, step, tokens: 0.0,
    ),
    "fuse": StageCost(
        tokens=lambda outlook, step: outlook.target_tokens(),
        cost=lambda outlook, step, tokens: fuse_cost(tokens, outlook.assumed),
        num_bytes=lambda outlook, step, tokens: topk_bytes(
            tokens,
            outlook.config.fuse.top_k + outlook.config.logits.tail_samples * len(outlook.config.models),
            outlook.assumed,
        ),
    ),
    "train": StageCost(
        tokens=lambda outlook, step: outlook.tokens["fuse"] * outlook.config.train.num_epochs,
        cost=_train_cost,
        num_bytes=lambda outlook, step, tokens: train_bytes(
            outlook.num_parameters(outlook.config.target), outlook.config.train.keep_checkpoints
        ),
    ),
    "eval": StageCost(
        tokens=lambda outlook, step: sum(tokens for _, tokens in _evaluated_tokens(outlook, step)),
        cost=_eval_cost,
        num_bytes=lambda outlook, step, tokens: 0.0,
    ),
}
"""The stages of ``run.stage_table.STAGES``, which a test compares with these."""
