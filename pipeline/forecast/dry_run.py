"""``ptafuse train --dry-run``: needs of training, before anything is loaded or downloaded."""

import json
import math
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.forecast.machines import idle_gpu_warnings
from pipeline.run.records import recorded_configurations
from pipeline.run.session import StageError
from pipeline.settings.run import RunConfig
from stages.contract.store import Store
from stages.models.config import ModelConfig
from train.config import LoraConfig, TrainConfig
from train.model.architecture import Architecture, architecture
from train.model.estimate import USABLE, Memory, estimate_memory, fits, num_steps, remedies


@dataclass(frozen=True)
class Amount:
    """Amount of training data.

    Attributes:
        num_blocks: number of blocks of one epoch.
        num_tokens: number of tokens of one epoch.
        origin: origin of these numbers, in words.
    """

    num_blocks: int
    num_tokens: int
    origin: str


def dry_run(config: RunConfig, store: Store, console: Console, *, tokens: int | None) -> None:
    """Print parameters, memory on each worker, steps and tokens of the train stage.

    Args:
        config: the run's configuration; of its models only the target's shape is read.
        store: the run directory; its fused shards give the number of tokens.
        console: console to print on.
        tokens: number of training tokens, used if there are no fused shards.

    Raises:
        StageError: the estimate does not fit into ``train.gpu_memory_gb``; says what to change.
        ValueError: the target's shape is not known here.
    """
    shape, origin = target_shape(config.target)
    architecture = _architecture(shape, config, config.train.lora)
    memory = estimate_memory(architecture, config.train, block_tokens=config.fuse.max_length)
    trained = (
        ""
        if architecture.num_trained == architecture.num_parameters
        else f", {architecture.num_trained:,} of them trained"
    )
    console.print(
        f"target {config.target.name}: {architecture.num_parameters:,} parameters{trained} (shape: {origin})",
        soft_wrap=True,
    )
    console.print(_amount_line(_amount(config, store, tokens), config.train), soft_wrap=True)
    train = config.train
    console.print(
        f"estimated memory of each of {train.num_workers} worker(s), micro-batches of {train.micro_batch_size} x "
        f"{config.fuse.max_length} tokens, {train.autocast}:",
        soft_wrap=True,
    )
    console.print(_memory_table(memory))
    for warning in idle_gpu_warnings(config):
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    if config.train.gpu_memory_gb is None:
        console.print("Set train.gpu_memory_gb to compare this with a GPU's memory.")
        return
    if not fits(memory, config.train.gpu_memory_gb):
        raise StageError(_refusal(memory, shape, architecture, config))
    console.print(f"It fits into {USABLE:.0%} of {config.train.gpu_memory_gb:g} GB.")


def target_shape(model: ModelConfig) -> tuple[Any, str]:
    """Find the transformers configuration of a model; also return where it was found.

    A folder is read; a hub id is looked for in the local cache, then among the published shapes that come with ptafuse,
    then on the hub.

    Raises:
        ValueError: it is in none of them; says what to do.
    """
    from transformers import AutoConfig

    arguments = {**model.pretrained_arguments(), "trust_remote_code": model.trust_remote_code}
    if model.path is not None:
        model.check()
        return AutoConfig.from_pretrained(**arguments), str(model.path)
    try:
        return AutoConfig.from_pretrained(**arguments, local_files_only=True), "the local cache of the hub"
    except OSError:
        pass  # not in the cache
    published = Path(str(resources.files("pipeline"))) / "configs" / "architectures"
    file = published / f"{str(model.hub).replace('/', '--')}.json"
    if file.is_file():
        values = json.loads(file.read_text())
        kind = values.pop("model_type")
        return AutoConfig.for_model(kind, **values), f"as published for {model.hub}; ptafuse's copy, only for dry runs"
    try:
        return AutoConfig.from_pretrained(**arguments), f"the hub, {model.hub}"
    except OSError as error:
        raise ValueError(
            f"the configuration of {model.hub} is not in the local cache of the hub and cannot be fetched "
            f"({str(error).splitlines()[0]}): give the target as `path`, a folder with its config.json"
        ) from error


def _architecture(shape: Any, config: RunConfig, lora: LoraConfig | None) -> Architecture:
    half = config.train.autocast == "bfloat16"
    return architecture(shape, block_tokens=config.fuse.max_length, half_precision=half, lora=lora)


def _amount(config: RunConfig, store: Store, tokens: int | None) -> Amount | None:
    """Take the amount from the fused shards of the same configuration, else from what the user says."""
    if tokens is not None:
        return Amount(math.ceil(tokens / config.fuse.max_length), tokens, "as given by --tokens")
    unread = {"train": None, "eval": None, "baselines": None, "interpret": None, "engine": None}
    same = config.model_copy(update=unread)
    for run in reversed(recorded_configurations(store).values()):
        if run.config.model_copy(update=unread) != same:
            continue
        manifests = store.manifests(run.steps["fuse"].folder).values()
        if manifests:
            origin = f"{len(manifests)} fused shards in {store.url}"
            return Amount(sum(m.num_rows_out for m in manifests), sum(m.num_tokens for m in manifests), origin)
    return None


def _amount_line(amount: Amount | None, config: TrainConfig) -> str:
    if amount is None:
        return "tokens and steps: not known before fuse has run; give --tokens to get the number of steps"
    return (
        f"{amount.num_tokens * config.num_epochs:,} tokens in {num_steps(amount.num_blocks, config):,} steps of "
        f"{config.batch_size} blocks, {config.num_epochs} epoch(s) of {amount.num_blocks:,} blocks ({amount.origin})"
    )


def _memory_table(memory: Memory) -> Table:
    table = Table()
    table.add_column("what")
    table.add_column("GB", justify="right")
    for field in fields(memory):
        table.add_row(field.name, _gb(getattr(memory, field.name)))
    # The update begins when gathered weights, activations and loss are freed.
    table.add_row("total, at the peak of a step", _gb(memory.total))
    return table


def _refusal(memory: Memory, shape: Any, architecture: Architecture, config: RunConfig) -> str:
    train, length = config.train, config.fuse.max_length
    limit = train.gpu_memory_gb
    assert limit is not None
    head = (
        f"an estimated {_gb(memory.total)} GB do not fit into {USABLE:.0%} of train.gpu_memory_gb = {limit:g}. Change "
        "one or several of these:"
    )
    lines = [head]
    choices = [(text, architecture, changed) for text, changed in remedies(architecture, train, block_tokens=length)]
    if train.lora is None:
        adapted = train.model_copy(update={"lora": LoraConfig()})
        choices.append((f"train.lora.r={LoraConfig().r}", _architecture(shape, config, adapted.lora), adapted))
    for text, model, changed in choices:
        needed = estimate_memory(model, changed, block_tokens=length)
        verdict = "fits" if fits(needed, limit) else "not enough by itself"
        lines.append(f"  --set {text}: {_gb(needed.total)} GB, {verdict}")
    return "\n".join(lines)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f}"
