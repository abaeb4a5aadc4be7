"""One TOML file a run: the stages' configuration classes, composed."""

import hashlib
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from pipeline.baselines import ENSEMBLE, WEIGHT_AVERAGE, BaselinesConfig
from pipeline.costs import AssumptionsConfig, PricesConfig
from pipeline.interpret.config import InterpretConfig
from stages.align.config import AlignConfig
from stages.contract.fingerprint import RUNTIME, Settings
from stages.fuse.config import FuseConfig
from stages.logits.config import LogitsConfig
from stages.models.config import ModelConfig
from stages.shard.config import DatasetConfig, ShardConfig, absolute_or_url
from train.config import EvalConfig, TrainConfig


class EngineConfig(Settings):
    """How shards are scheduled; changes no result."""

    max_attempts: int = Field(3, ge=1, description="Attempts at a shard before it counts as failed.")
    num_cpus: int | None = Field(None, ge=1, description="CPUs of a Ray started here; all of the machine by default.")
    scratch: Path | None = Field(
        None,
        description="Where training works when the run directory is in an object store, which gets copies of its "
        "checkpoints: a local folder, on a cluster one that all nodes see; ~/.cache/ptafuse/scratch by default.",
    )
    no_progress_timeout_seconds: int = Field(
        7200, ge=60, description="Ray Data gives up when no shard ends for this long; must exceed a shard's time."
    )


class RunConfig(Settings):
    """The whole configuration of a run."""

    name: Annotated[str, RUNTIME] = Field(
        pattern=r"^[a-z0-9][a-z0-9._-]*$", description="Names the recorded configuration: lower case, no spaces."
    )
    logits_from: Annotated[str | None, AfterValidator(absolute_or_url), RUNTIME] = Field(
        None,
        description="Another run directory (a path or an fsspec URL): shards and logits that are done there under the same "
        "fingerprint are read there instead of being computed; nothing is written there.",
    )
    dataset: DatasetConfig
    target: ModelConfig
    sources: tuple[ModelConfig, ...] = Field(min_length=1, description="The models fused into the target, one or more.")
    shard: ShardConfig = ShardConfig()
    logits: LogitsConfig = LogitsConfig()
    align: AlignConfig = AlignConfig()
    fuse: FuseConfig = FuseConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    interpret: InterpretConfig = InterpretConfig()
    baselines: BaselinesConfig = BaselinesConfig()
    engine: Annotated[EngineConfig, RUNTIME] = EngineConfig()
    prices: Annotated[PricesConfig, RUNTIME] = PricesConfig()
    assumptions: Annotated[AssumptionsConfig, RUNTIME] = AssumptionsConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [model.name for model in self.models]
        if "fused" in names:
            raise ValueError("a model cannot be named 'fused': that is the trained model's name")
        for baseline in (ENSEMBLE, WEIGHT_AVERAGE):
            if baseline in names:
                raise ValueError(f"a model cannot be named {baseline!r}: that is a baseline's name")
        self.baselines.check(len(self.sources))
        double = sorted({name for name in names if names.count(name) > 1})
        if double:
            raise ValueError(f"model names must differ (they name folders), but {double[0]!r} is given twice")
        if self.align.top_k > self.logits.top_k:
            raise ValueError(
                f"align.top_k = {self.align.top_k} asks for more candidates than logits.top_k = {self.logits.top_k} keeps"
            )
        if self.align.top_p is not None and self.align.top_p > self.logits.top_p:
            raise ValueError(
                f"align.top_p = {self.align.top_p} asks for more probability than logits.top_p = {self.logits.top_p} keeps"
            )
        if self.eval.split == "test" and self.shard.test_fraction == 0:
            raise ValueError('eval.split = "test" has no documents: set shard.test_fraction, which is 0')
        return self

    @property
    def models(self) -> tuple[ModelConfig, ...]:
        """The target, then the sources."""
        return (self.target, *self.sources)


class ConfigError(ValueError):
    """The configuration cannot be used; the message says where and what to do."""


def load_config(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a run's configuration.

    Args:
        path: a TOML file; a bare name such as ``demo`` or ``pipeline/configs/demo.toml`` of an installed ptafuse
            finds the shipped one.
        overrides: ``"align.epsilon=0.2"``: a dotted key and a TOML value (bare words are strings).

    Raises:
        ConfigError: a file, key or value is wrong.
    """
    source = _find(Path(path))
    try:
        values = tomllib.loads(source.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not TOML: {error}") from None
    for override in overrides:
        _set(values, override)
    return parse_config(values, where=str(source))


def parse_config(values: dict[str, Any], *, where: str) -> RunConfig:
    """Check a configuration's values.

    Raises:
        ConfigError: lists every wrong key and value, with its place in the file.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [f"{where}: {error.error_count()} wrong setting(s)"]
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"]) or "(the file)"
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden":
                message = f"there is no such setting; known here: {', '.join(_known(problem['loc'][:-1]))}"
            lines.append(f"  {key}: {message}")
        raise ConfigError("\n".join(lines)) from None


def shipped_configs() -> list[Path]:
    """The configurations that come with ptafuse."""
    folder = Path(str(resources.files("pipeline"))) / "configs"
    return sorted(folder.glob("*.toml"))


def config_id(config: RunConfig) -> str:
    """12 hexadecimal digits that identify a resolved configuration, runtime settings included."""
    return hashlib.sha256(config.model_dump_json(by_alias=True).encode()).hexdigest()[:12]


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    for shipped in shipped_configs():
        if path in (Path(shipped.name), Path(shipped.stem), Path("pipeline/configs") / shipped.name):
            return shipped
    names = ", ".join(shipped.stem for shipped in shipped_configs())
    raise ConfigError(
        f"no such configuration: {path}. Give the path of a TOML file, or one of the shipped ones: {names}"
    )


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected KEY=VALUE, e.g. --set align.epsilon=0.2")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, last = key.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override}: {table} is not a table")
    values[last] = value


def _known(location: tuple[int | str, ...]) -> list[str]:
    kind: Any = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        annotation = kind.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        kind = next(option for option in options if isinstance(option, type) and issubclass(option, Settings))
    return sorted(field.alias or name for name, field in kind.model_fields.items())
