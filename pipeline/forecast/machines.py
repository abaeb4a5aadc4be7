"""Parts of a forecast that depend on machines and on the models' code: idle GPUs, attention without kernels."""

import json
from importlib import resources
from pathlib import Path
from typing import Final

from pipeline.run.stage_table import sharded_stage
from pipeline.settings.run import RunConfig
from stages.models.config import ModelConfig

EAGER_ONLY: Final = frozenset({"bloom", "codegen", "mpt"})
"""``model_type`` of architectures for which transformers has neither SDPA nor FlashAttention (a test asks its classes)."""


def is_eager_only(model: ModelConfig) -> bool:
    """Return whether a model computes attention score by score; False where its architecture is not available."""
    return _model_type(model) in EAGER_ONLY


def _model_type(model: ModelConfig) -> str | None:
    """Return the architecture as a config.json says: the model's own, the hub cache's, or one that comes with ptafuse."""
    if model.path is not None:
        file: str | Path | object = model.path / "config.json"
    else:
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(str(model.hub), "config.json", revision=model.revision)
        if not isinstance(file, str | Path):
            shipped = Path(str(resources.files("pipeline"))) / "configs" / "architectures"
            file = shipped / f"{str(model.hub).replace('/', '--')}.json"
    if not isinstance(file, str | Path):
        return None
    try:
        kind = json.loads(Path(file).read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):  # no such file, or another kind of file: `check` says what is wrong
        return None
    return kind if isinstance(kind, str) else None


def attention_warnings(config: RunConfig) -> list[str]:
    """Say which models have no fast attention."""
    return [
        f"{model.name} runs with eager attention: transformers has neither SDPA nor FlashAttention for it. It needs "
        "memory for every pair of positions (logits.batch_tokens x logits.max_length scores per head), and on a GPU "
        f"its time is taken to be {config.assumptions.eager_slowdown:g} times as long"
        for model in config.models
        if is_eager_only(model)
    ]


def idle_gpu_warnings(config: RunConfig) -> list[str]:
    """Say which stages leave GPUs of a machine idle, where ``engine.node_cpus`` and ``node_gpus`` describe one."""
    node_cpus, node_gpus = config.engine.node_cpus, config.engine.node_gpus
    if node_cpus is None or node_gpus is None:
        return []
    needs: dict[str, tuple[float, float]] = {}
    for model in config.models:
        logits = sharded_stage("logits").resources(config, model.name)
        if logits.gpus:
            needs["logits"] = (logits.cpus, logits.gpus)
    train = config.train
    if train.device != "cpu" and (train.gpus_per_worker or train.device == "cuda"):
        needs["train"] = (train.cpus_per_worker, train.gpus_per_worker or 1)
    return [
        warning
        for stage, (cpus, gpus) in needs.items()
        if (warning := _idle_gpus(stage, cpus, gpus, node_cpus, node_gpus)) is not None
    ]


def _idle_gpus(stage: str, cpus: float, gpus: float, node_cpus: float, node_gpus: float) -> str | None:
    wanted, places = int(node_gpus / gpus), int(min(node_gpus / gpus, node_cpus / cpus))
    if places >= wanted > 0:
        return None
    asked = f"{stage} asks for {cpus:g} CPUs and {gpus:g} GPUs per worker"
    if not wanted:
        return f"{asked}, and a machine has {node_gpus:g} GPUs: no worker fits. Lower {stage}.gpus_per_worker"
    return (
        f"{asked}, and a machine with {node_cpus:g} CPUs and {node_gpus:g} GPUs has room for {places}: "
        f"{node_gpus - places * gpus:g} GPUs stay idle. Set {stage}.cpus_per_worker to at most {node_cpus / wanted:g}, or give "
        f"each machine {wanted * cpus:g} CPUs"
    )
