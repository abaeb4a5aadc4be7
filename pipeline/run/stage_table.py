"""STAGES, the only list of stages, with everything that the pipeline asks of a stage.

Whatever depends on which stage it is, is a field of its row here, or an entry of a dictionary whose keys a test compares
with this table (``forecast.stage_costs.STAGE_COSTS``, ``analysis.positions.VIEWS``, ``workflow.stages.JOBS``).

The stages' code is imported where a stage is built: it loads torch and compilers, and ``status``, ``plan`` and ``gc`` need
neither.
"""

from collections.abc import Mapping
from typing import Any, Final

from pipeline.dataset.documents import dataset_identity
from pipeline.run.specs import JobStage, ShardedStage, StageSpec
from pipeline.settings.adapt import FOLDS, SourceConfig
from pipeline.settings.baselines import ENSEMBLE, Baseline
from pipeline.settings.run import RunConfig
from pipeline.settings.texts import TEXT_VERSION
from stages.align.config import VERSION as ALIGN_VERSION
from stages.contract.manifest import HealthMetric, Mean
from stages.contract.stage import Stage
from stages.fuse.config import FIT_VERSION
from stages.fuse.config import ROW_GROUP_BYTES as FUSE_ROW_GROUP_BYTES
from stages.fuse.config import VERSION as FUSE_VERSION
from stages.logits.config import VERSION as LOGITS_VERSION
from stages.models.config import ModelConfig
from stages.models.token_tables import TokenTables
from stages.shard.config import VERSION as SHARD_VERSION
from train.config import EVAL_VERSION, TRAIN_VERSION
from train.job import MANIFEST

ADAPT_VERSION: Final = 2
"""Version of the adapt stage; raised when the same settings, model and text give another model."""
FUSED: Final = "fused"
"""Name of the trained model among the evaluated ones."""


def step_key(stage: str, name: str | None) -> str:
    """Return ``logits/gemma3``, or ``shard``."""
    return stage if name is None else f"{stage}/{name}"


def adapted_source(config: RunConfig, name: str | None) -> tuple[SourceConfig, str]:
    """Return the source and the fold of an adapt step.

    Args:
        config: the configuration.
        name: the step's, one of ``_adapt_names``.
    """
    return next((source, fold) for source in config.sources for fold in FOLDS if f"{source.name}-{fold}" == name)


def _adapt_names(config: RunConfig) -> tuple[str, ...]:
    return tuple(f"{source.name}-{fold}" for source in config.sources if source.adapt is not None for fold in FOLDS)


def _adapt_settings(config: RunConfig, name: str | None) -> dict[str, Any]:
    source, fold = adapted_source(config, name)
    assert source.adapt is not None
    training = source.adapt.training(config.train, isolate=source.reads_conversations).result_settings()
    return {
        "adapt": {**training, "max_length": source.adapt.max_length},
        "fold": fold,
        "train version": TRAIN_VERSION,
        **_model_identities(source),
    }


def _logits_inputs(config: RunConfig, name: str | None) -> dict[str, str]:
    adapted = any(source.name == name and source.adapt is not None for source in config.sources)
    return {"shard": "shard", **({fold: f"adapt/{name}-{fold}" for fold in FOLDS} if adapted else {})}


def eval_key(model: str, text: str | None = None) -> str:
    """Return the key of a model's evaluation on a text, or on the held-out split: ``eval/gemma3/news``, ``eval/gemma3``."""
    return step_key("eval", model if text is None else f"{model}/{text}")


def model_and_text(name: str | None) -> tuple[str | None, str | None]:
    """Return the model and the text that a step's name consists of; None for what it lacks."""
    if name is None:
        return None, None
    model, _, text = name.partition("/")
    return model, text or None


def _logits_choices(config: RunConfig, name: str | None) -> dict[str, str]:
    logits = config.logits_of(name)
    if logits.backend != "auto":
        return {}
    from stages.logits.backends.choose import choose_backend

    return {"backend": choose_backend(logits, config.find_model(name))}


def _candidates(config: RunConfig, _: str | None) -> dict[str, str]:
    keys = [f"logits/{model.name}" for model in config.models] + [f"align/{model.name}" for model in config.sources]
    return {key: key for key in keys}


def _fuse_inputs(config: RunConfig, name: str | None) -> dict[str, str]:
    return _candidates(config, name) | ({"fit": "fit"} if _is_fitted(config) else {})


def _fuse_settings(config: RunConfig, name: str | None) -> dict[str, Any]:
    del name
    # `chosen` counts the candidates, and ties go by their order.
    settings = {"fuse": config.fuse.result_settings(), "candidates": [model.name for model in config.models]}
    return settings | _kinds(config)


def _fit_settings(config: RunConfig, name: str | None) -> dict[str, Any]:
    del name
    names = [model.name for model in config.models]
    return {"fuse": {"per": config.fuse.per, "fit_shards": config.fuse.fit_shards}, "candidates": names} | _kinds(
        config
    )


def _kinds(config: RunConfig) -> dict[str, Any]:
    """Return the column with the kind of each document, where weights depend on it."""
    return {"kind_column": config.dataset.kind_column} if _by_kind(config) else {}


def _is_fitted(config: RunConfig) -> bool:
    return config.fuse.function == "fitted"


def _by_kind(config: RunConfig) -> bool:
    return _is_fitted(config) and config.fuse.per == "kind"


def _fit_metrics(result: Mapping[str, Any]) -> dict[str, HealthMetric]:
    """Return the weights for the whole text, and what the mixture makes of it."""
    whole = result["rows"][0]
    weights = {f"weight/{name}": weight for name, weight in zip(result["candidates"], whole["weights"], strict=True)}
    count = whole["num_positions"]
    nll = {
        f"nll/{name}": Mean(total=value * count, count=count)
        for name, value in zip(("mixture", *result["candidates"]), (whole["nll"], *whole["candidate_nll"]), strict=True)
    }
    return {"positions": count, "kinds": len(result["rows"]) - 1, **weights, **nll}


_HELD_OUT_ONLY: Final = ("split", "max_documents", "num_generations", "generation_tokens")
"""Settings of ``[eval]`` that say which held-out documents are scored, and of which a model writes answers."""


def _evaluated(config: RunConfig) -> tuple[str, ...]:
    """Return what is evaluated: the target before training, the sources, the baselines, and the trained model.

    First on the held-out split, then on every other text.
    """
    sources = (source.name for source in config.evaluated_sources)
    models = (config.target.name, *sources, *config.baselines.methods, FUSED)
    return (*models, *(f"{model}/{text.name}" for text in config.eval.texts for model in models))


def _eval_settings(config: RunConfig, name: str | None) -> dict[str, Any]:
    model, text = model_and_text(name)
    settings: dict[str, Any] = {"eval": config.eval.result_settings()}
    if text is not None:
        settings["eval"] = {key: value for key, value in settings["eval"].items() if key not in _HELD_OUT_ONLY}
        settings["text"] = {**config.eval.find_text(text).result_settings(), "version": TEXT_VERSION}
    baseline = next((method for method in config.baselines.methods if method == model), None)
    return settings if baseline is None else {**settings, **_baseline_settings(config, baseline)}


def _baseline_settings(config: RunConfig, baseline: Baseline) -> dict[str, Any]:
    """Return the settings that a baseline's result depends on, other than the models and the text."""
    settings: dict[str, Any] = {"baselines": config.baselines.baseline_settings(baseline, len(config.sources))}
    if baseline == ENSEMBLE:
        align = config.align.result_settings()
        settings["align"] = {name: align[name] for name in align if name not in ("pairing", "inexact")}
        settings["align version"] = ALIGN_VERSION
        settings["logits"] = {"top_k": config.logits.top_k, "top_p": config.logits.top_p}
    return settings


def _eval_identities(config: RunConfig, name: str | None) -> dict[str, str]:
    """Return the hashes of the evaluated model's files; of all models' files for a baseline, which has none of its own.

    A text is cut to fit every tokenizer, and only bytes that every model predicts count: so all tokenizers decide its figures.
    """
    model, text = model_and_text(name)
    if text is None:
        return _evaluated_identities(config, model)
    tokenizers = sorted({each_model.tokenizer_identity() for each_model in config.models})
    documents = dataset_identity(config.eval.find_text(text))
    return {**_evaluated_identities(config, model), "documents": documents, "tokenizers": ",".join(tokenizers)}


def _evaluated_identities(config: RunConfig, name: str | None) -> dict[str, str]:
    if name == FUSED:
        return {}
    if name in config.baselines.methods:
        roles = ("target", *(f"source {number}" for number in range(1, len(config.models))))
        return {
            f"{kind} of {role}": identity
            for role, model in zip(roles, config.models, strict=True)
            for kind, identity in _model_identities(model).items()
        }
    return _model_identities(config.find_model(name))


def _model_identities(model: ModelConfig) -> dict[str, str]:
    return {"weights": model.weights_identity(), "tokenizer": model.tokenizer_identity()}


def _shard_stage(config: RunConfig, _: str | None, __: TokenTables) -> Stage:
    from stages.shard.stage import ShardStage

    return ShardStage(config.shard, config.models, train_on=config.dataset.train_on)


def _logits_stage(config: RunConfig, name: str | None, _: TokenTables) -> Stage:
    from stages.logits.stage import LogitsStage

    return LogitsStage(config.logits_of(name), config.find_model(name))


def _align_stage(config: RunConfig, name: str | None, tables: TokenTables) -> Stage:
    from stages.align.stage import AlignStage

    return AlignStage(config.align, config.target, config.find_model(name), tables)


def _fuse_stage(config: RunConfig, _: str | None, tables: TokenTables) -> Stage:
    from stages.fuse.stage import FuseStage

    return FuseStage(config.fuse, config.target, config.sources, tables)


STAGES: Final[tuple[StageSpec, ...]] = (
    ShardedStage(
        name="shard",
        help="Cut the dataset into fixed shards of segments that fit every tokenizer.",
        version=SHARD_VERSION,
        settings=lambda config, name: {
            "dataset": config.dataset.result_settings(),
            "shard": config.shard.result_settings(),
        },
        inputs=lambda config, name: {},  # documents, by the frozen plan
        build=_shard_stage,
        section=lambda config: config.shard,
        reads_documents=True,
        tokenizers=lambda config, name: config.models,
        can_be_shared=True,
    ),
    JobStage(
        name="adapt",
        help="Train the sources that have an `adapt` section on the run's own text, before their logits are dumped.",
        version=ADAPT_VERSION,
        settings=_adapt_settings,
        inputs=lambda config, name: {"shard": "shard"},
        names=_adapt_names,
        applies=lambda config: bool(_adapt_names(config)),
        result=MANIFEST,
        keeps_log=True,
    ),
    ShardedStage(
        name="logits",
        help="Run each model over every shard and keep the top-k logprobs of every position.",
        version=LOGITS_VERSION,
        settings=lambda config, name: {
            "logits": config.logits_of(name).result_settings(),
            **_model_identities(config.find_model(name)),
        },
        inputs=_logits_inputs,
        names=lambda config: tuple(model.name for model in config.models),
        build=_logits_stage,
        section=lambda config: config.logits,
        train_rows_only=True,
        runs_model=True,
        tokenizers=lambda config, name: (config.find_model(name),),
        can_be_shared=True,
        choices=_logits_choices,
        shards_per_worker=2,
    ),
    ShardedStage(
        name="align",
        help="Pair each source's tokens with the target's, and move its distributions into the target's vocabulary.",
        version=ALIGN_VERSION,
        settings=lambda config, name: {"align": config.align.result_settings()},
        inputs=lambda config, name: {"target": f"logits/{config.target.name}", "source": f"logits/{name}"},
        names=lambda config: tuple(model.name for model in config.sources),
        build=_align_stage,
        section=lambda config: config.align,
        distribution="aligned",
    ),
    JobStage(
        name="fit",
        help="Fit the weights with which fuse mixes the candidates, if fuse.function = 'fitted'.",
        version=FIT_VERSION,
        settings=_fit_settings,
        inputs=_candidates,
        applies=_is_fitted,
        reads_kinds=_by_kind,
        result="weights.json",
        is_table=True,
        metrics=_fit_metrics,
    ),
    ShardedStage(
        name="fuse",
        help="Choose or mix the candidate distributions at each position, and pack segments into training blocks.",
        version=FUSE_VERSION,
        settings=_fuse_settings,
        inputs=_fuse_inputs,
        reads_kinds=_by_kind,
        build=_fuse_stage,
        section=lambda config: config.fuse,
        distribution="fused",
        row_group_bytes=FUSE_ROW_GROUP_BYTES,
    ),
    JobStage(
        name="train",
        help="Train the target on the gold tokens and the fused distributions; continues from the newest checkpoint.",
        version=TRAIN_VERSION,
        settings=lambda config, name: {
            "train": config.train.result_settings(),
            "weights": config.target.weights_identity(),
        },
        inputs=lambda config, name: {"fuse": "fuse"},
        result=MANIFEST,
        keeps_log=True,
    ),
    JobStage(
        name="eval",
        help="Evaluate the target before and after training, each source and baselines on held-out and other texts; "
        "benchmarks on request.",
        version=EVAL_VERSION,
        settings=_eval_settings,
        inputs=lambda config, name: {
            "shard": "shard",
            **({"train": "train"} if model_and_text(name)[0] == FUSED else {}),
        },
        names=_evaluated,
        identities=_eval_identities,
        result="bits-per-byte.json",
    ),
)
"""The order in which the stages run."""

SHARDED_STAGES: Final = tuple(spec for spec in STAGES if isinstance(spec, ShardedStage))


def stage_spec(name: str) -> StageSpec:
    """Return the row of a stage."""
    return next(spec for spec in STAGES if spec.name == name)


def sharded_stage(name: str) -> ShardedStage:
    """Return the row of a sharded stage."""
    return next(spec for spec in SHARDED_STAGES if spec.name == name)


def job_stage(name: str) -> JobStage:
    """Return the row of a stage that computes one result per step."""
    return next(spec for spec in STAGES if isinstance(spec, JobStage) and spec.name == name)
