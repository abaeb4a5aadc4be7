"""Configuration of a run, one TOML file: the stages' configuration classes, composed."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from pipeline.settings.adapt import SourceConfig
from pipeline.settings.baselines import ENSEMBLE, WEIGHT_AVERAGE, BaselinesConfig
from pipeline.settings.interpret import InterpretConfig
from pipeline.settings.planning import AssumptionsConfig, PricesConfig
from pipeline.settings.texts import EvaluationConfig
from stages.align.config import AlignConfig
from stages.contract.fingerprint import RUNTIME, Settings
from stages.contract.names import Name, refuse_same_folder
from stages.fuse.config import FuseConfig
from stages.logits.config import LogitsConfig
from stages.models.config import PLAIN, ModelConfig
from stages.shard.config import DatasetConfig, ShardConfig, absolute_or_url
from train.config import TrainConfig


class EngineConfig(Settings):
    """Settings for scheduling shards; none of them changes a result."""

    max_attempts: int = Field(3, ge=1, description="Number of attempts at a shard before it counts as failed.")
    num_cpus: int | None = Field(
        None, ge=1, description="CPUs of a Ray instance that is started here; by default all CPUs of the machine."
    )
    connect_timeout_seconds: float = Field(60, gt=0, description="How long to wait for the cluster at RAY_ADDRESS.")
    autoscaling: bool | None = Field(
        None,
        description="Whether the cluster at RAY_ADDRESS adds machines by itself. By default it may: a step has at "
        "most as many actors as shards, and waits for machines. `false`: a step has the actors that fit, and workers "
        "that do not fit are refused.",
    )
    cluster_timeout_seconds: int = Field(
        3600, ge=1, description="How long a step waits until a cluster that can grow has room for its workers."
    )
    node_cpus: int | None = Field(
        None,
        ge=1,
        description="CPUs of a machine with GPUs, so that `plan` and `--dry-run` can report GPUs that stay idle.",
    )
    node_gpus: int | None = Field(None, ge=1, description="GPUs of such a machine; set together with `node_cpus`.")
    scratch: Path | None = Field(
        None,
        description="Working folder of training when the run directory is in an object store, to which checkpoints "
        "and the model are uploaded: a folder on the disk of each machine, or one that all machines share; "
        "~/.cache/ptafuse/scratch by default.",
    )
    no_progress_timeout_seconds: int = Field(
        7200,
        ge=60,
        description="Ray Data gives up if no shard finishes for this long; must exceed the time of a shard.",
    )

    @model_validator(mode="after")
    def _node_is_described_whole(self) -> Self:
        if (self.node_cpus is None) != (self.node_gpus is None):
            raise ValueError("`node_cpus` and `node_gpus` describe one machine: give both or neither")
        return self


def _messages_column(values: dict[str, Any]) -> Any:
    """Return `dataset.messages_column` of a configuration that is not checked yet; None: documents are texts."""
    dataset = values.get("dataset")
    return dataset.get("messages_column") if isinstance(dataset, dict) else getattr(dataset, "messages_column", None)


class RunConfig(Settings):
    """Whole configuration of a run."""

    name: Annotated[Name, RUNTIME] = Field(description="Names the recorded configuration: letters, digits, . _ -")
    logits_from: Annotated[str | None, AfterValidator(absolute_or_url), RUNTIME] = Field(
        None,
        description="Another run directory (a path or an fsspec URL): finished shards and logits with the same "
        "fingerprint are read from there instead of being computed; nothing is written there.",
    )
    dataset: DatasetConfig
    target: ModelConfig
    sources: tuple[SourceConfig, ...] = Field(
        min_length=1, description="The models fused into the target, one or more."
    )
    shard: ShardConfig = ShardConfig()
    logits: LogitsConfig = LogitsConfig()
    align: AlignConfig = AlignConfig()
    fuse: FuseConfig = FuseConfig()
    train: TrainConfig = TrainConfig()
    eval: EvaluationConfig = EvaluationConfig()
    interpret: InterpretConfig = InterpretConfig()
    baselines: BaselinesConfig = BaselinesConfig()
    engine: Annotated[EngineConfig, RUNTIME] = EngineConfig()
    prices: Annotated[PricesConfig, RUNTIME] = PricesConfig()
    assumptions: Annotated[AssumptionsConfig, RUNTIME] = AssumptionsConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_packing(cls, values: Any) -> Any:
        """Fill in the packing of the paper's preset, which cuts blocks; never for conversations."""
        if isinstance(values, dict) and _messages_column(values) is None:
            align, fuse = values.get("align"), values.get("fuse", {})
            if isinstance(align, dict) and align.get("preset") == "paper" and isinstance(fuse, dict):
                return {**values, "fuse": {"packing": "cut", **fuse}}
        return values

    @model_validator(mode="before")
    @classmethod
    def _fill_control_tokens(cls, values: Any) -> Any:
        """Copy the dataset's ``control_tokens`` to every model whose own section does not set it."""
        dataset = values.get("dataset") if isinstance(values, dict) else None
        if not isinstance(dataset, dict) or "control_tokens" not in dataset:
            return values

        def filled(model: Any) -> Any:
            return {"control_tokens": dataset["control_tokens"], **model} if isinstance(model, dict) else model

        sources = values.get("sources")
        models = {"target": filled(values["target"])} if "target" in values else {}
        if isinstance(sources, list | tuple):
            models["sources"] = [filled(source) for source in sources]
        return {**values, **models}

    @model_validator(mode="before")
    @classmethod
    def _fill_conversations(cls, values: Any) -> Any:
        """Tell every model whether the dataset holds conversations; a model's section cannot say so."""
        if not isinstance(values, dict):
            return values
        reads = _messages_column(values) is not None

        def filled(model: Any) -> Any:
            if isinstance(model, ModelConfig):
                return model.model_copy(update={"reads_conversations": reads})
            if isinstance(model, dict) and (reads or "reads_conversations" in model):
                return {**model, "reads_conversations": reads}
            return model

        sources = values.get("sources")
        models = {"target": filled(values["target"])} if "target" in values else {}
        if isinstance(sources, list | tuple):
            models["sources"] = [filled(source) for source in sources]
        train = values.get("train", {})
        if reads and isinstance(train, dict):
            models["train"] = {"isolate_documents": True, **train}
        return {**values, **models}

    @model_validator(mode="after")
    def _names_are_free(self) -> Self:
        taken = {"fused": "the trained model's", ENSEMBLE: "a baseline's", WEIGHT_AVERAGE: "a baseline's"}
        for model in self.models:
            owner = taken.get(model.name.casefold())
            if owner is not None:
                raise ValueError(f"a model cannot be named {model.name!r}: that is {owner} name")
        refuse_same_folder("model names", (model.name for model in self.models))
        return self

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        self.baselines.check(len(self.sources))
        served = [source.name for source in self.sources if source.is_served]
        if served and self.baselines.methods:
            raise ValueError(
                f"the baselines run every model, and source {served[0]} has backend = 'server': turn off "
                f"{', '.join(f'baselines.{method}' for method in self.baselines.methods)}"
            )
        for source in self.sources:
            if source.adapt is not None:
                source.adapt.training(self.train)  # refuses a batch that its workers cannot share
        for source in self.sources:
            self.logits_of(source.name)
        if self.align.top_k > self.logits.top_k:
            raise ValueError(
                f"align.top_k = {self.align.top_k} asks for more candidates than logits.top_k = {self.logits.top_k} keeps"
            )
        if self.align.top_p is not None and self.align.top_p > self.logits.top_p:
            raise ValueError(
                f"align.top_p = {self.align.top_p} asks for more probability than logits.top_p = {self.logits.top_p} keeps"
            )
        self._draws_are_kept()
        if self.fuse.packing == "whole" and self.fuse.max_length < self.shard.max_length:
            raise ValueError(
                f"fuse.max_length = {self.fuse.max_length} is below shard.max_length = {self.shard.max_length}, and "
                "with fuse.packing = 'whole' every segment must fit a block: raise fuse.max_length, lower "
                "shard.max_length, or set packing = 'cut'"
            )
        self._conversations_are_whole()
        if self.fuse.function == "fitted" and self.align.tail != "bucket":
            raise ValueError(
                "fuse.function = 'fitted' needs align.tail = 'bucket': a row rescaled to 1 gives no probability to a "
                "gold token that it does not list, and only weight 0 would fit it"
            )
        if self.train.tail_loss == "gold" and self.align.tail != "bucket":
            raise ValueError("train.tail_loss = 'gold' needs align.tail = 'bucket': a row rescaled to 1 has no tail")
        if self.fuse.function == "fitted" and self.fuse.per == "kind" and self.dataset.kind_column is None:
            raise ValueError("fuse.per = 'kind' needs dataset.kind_column: the column with the kind of each document")
        if self.eval.split == "test" and self.shard.test_fraction == 0:
            raise ValueError('eval.split = "test" has no documents: set shard.test_fraction, which is 0')
        return self

    def _conversations_are_whole(self) -> None:
        """Refuse settings that cut conversations, or that render texts as conversations.

        Raises:
            ValueError: says which setting, and what to do.
        """
        for text in self.eval.texts:
            if text.has_conversations != self.dataset.has_conversations:
                held, read = ("conversations", "texts") if text.has_conversations else ("texts", "conversations")
                raise ValueError(
                    f"{text.section} holds {held}, and the run's models read {read}: "
                    + (
                        "remove messages_column there, or evaluate it in a run on conversations"
                        if text.has_conversations
                        else "set messages_column there, or evaluate it in a run on texts"
                    )
                )
        if self.dataset.has_conversations:
            if self.fuse.packing != "whole":
                raise ValueError(
                    f"fuse.packing = {self.fuse.packing!r} cuts segments at block boundaries, and "
                    "dataset.messages_column says that they are conversations, which must stay whole: set "
                    "fuse.packing = 'whole'"
                )
            if not self.train.isolate_documents:
                raise ValueError(
                    "train.isolate_documents = false lets packed conversations see each other, but the models that it "
                    "learns from saw each conversation alone: remove isolate_documents; with dataset.messages_column "
                    "it defaults to true"
                )
            with_bos = next(
                (model for model in self.models if model.bos is not None and model.chat_template != PLAIN), None
            )
            if with_bos is not None:
                raise ValueError(
                    f"model {with_bos.name}: bos = {str(with_bos.bos).lower()} applies to texts, and in conversations the chat "
                    "template decides whether they begin with BOS: remove bos"
                )
        else:
            if self.eval.num_generations:
                raise ValueError(
                    f"eval.num_generations = {self.eval.num_generations} asks for answers to held-out turns, and the "
                    "dataset holds texts: set dataset.messages_column, or remove num_generations"
                )
            templates = [model.name for model in self.models if model.chat_template is not None]
            if templates:
                raise ValueError(
                    f"model {templates[0]}: chat_template says how conversations are rendered, and the dataset holds "
                    "texts: set dataset.messages_column, or remove chat_template"
                )

    def _draws_are_kept(self) -> None:
        """Refuse settings that narrow or rescale rows with draws, whose expectation is the full distribution.

        Raises:
            ValueError: a setting does; says which, and what to set.
        """
        samples, top_k = self.logits.tail_samples, self.logits.top_k
        if not samples:
            return
        needs = f"logits.tail_samples = {samples} needs"
        if self.align.tail != "bucket":
            raise ValueError(
                f"{needs} align.tail = 'bucket', and it is {self.align.tail!r}: draws stand for the tail, which a row "
                "rescaled to 1 does not have. Choose align.preset = 'semi-relaxed', or set align.tail"
            )
        if self.align.top_k < top_k:
            raise ValueError(
                f"{needs} align.top_k = logits.top_k = {top_k}, and it is {self.align.top_k}: no draws stand for the "
                "entries between the two"
            )
        if self.align.top_p is not None:
            raise ValueError(
                f"{needs} windows that are not narrowed, and align.top_p = {self.align.top_p} cuts entries for which "
                "no draws stand: remove align.top_p"
            )
        if self.fuse.top_k < top_k:
            raise ValueError(
                f"{needs} fuse.top_k of at least logits.top_k = {top_k}, and it is {self.fuse.top_k}: a fused row keeps "
                "fuse.top_k entries and the draws of each candidate, and draws would be cut"
            )
        if self.train.tail_loss == "gold":
            raise ValueError(
                f"{needs} train.tail_loss = 'bucket': 'gold' stands for the mass that rows omit, and with draws they "
                "omit nothing on average, so the tail would be learned twice"
            )

    @property
    def models(self) -> tuple[ModelConfig, ...]:
        """Target, then sources."""
        return (self.target, *self.sources)

    @property
    def evaluated_sources(self) -> tuple[SourceConfig, ...]:
        """Sources that can be evaluated: all except those of a server."""
        return tuple(source for source in self.sources if not source.is_served)

    @property
    def eval_cpus(self) -> float:
        """CPUs of an evaluation: those of its section, else those of training."""
        return self.eval.cpus_per_worker or self.train.cpus_per_worker

    def logits_of(self, name: str | None) -> LogitsConfig:
        """Return the settings of the logits stage for one model."""
        overrides = {
            key: value
            for source in self.sources
            if source.name == name
            for key, value in (("backend", source.backend), ("served_model", source.served_model))
            if value is not None
        }
        # Checked again: a backend that goes with no other setting of the section is refused like that of the section.
        return (
            LogitsConfig.model_validate({**self.logits.model_dump(by_alias=True), **overrides})
            if overrides
            else self.logits
        )

    def find_model(self, name: str | None) -> ModelConfig:
        """Return the model of that name: the target or a source.

        Raises:
            KeyError: no model of this configuration has the name.
        """
        for model in self.models:
            if model.name == name:
                return model
        raise KeyError(f"{name!r} is not one of this configuration's models: {', '.join(m.name for m in self.models)}")
