"""Read the TOML file of a run."""

import hashlib
import tomllib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from pipeline.settings.explain import describe_problems, describe_toml_error
from pipeline.settings.run import RunConfig

_SHIPPED: Final = Path(str(resources.files("pipeline"))) / "configs"


FILL_IN: Final = "FILL IN"
"""Placeholder in a configuration of ``ptafuse init`` where a value is needed."""


class ConfigError(ValueError):
    """Error of a configuration that cannot be used; the message says where and what to do."""


def load_config(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a run's configuration.

    Args:
        path: a TOML file; a bare name such as ``demo`` or ``pipeline/configs/demo.toml`` of an installed ptafuse
            finds the shipped one.
        overrides: ``"align.epsilon=0.2"``: a dotted key and a TOML value (bare words are strings); ``sources.mpt.path``
            is of the source named ``mpt``.

    Raises:
        ConfigError: a file, key or value is wrong.
    """
    source = find_toml(Path(path), shipped_configs(), "configuration")
    values = read_toml(source)
    for override in overrides:
        _set(values, override)
    unfilled = list(_unfilled(values))
    if unfilled:
        raise ConfigError(f"{source}: fill in {', '.join(unfilled)}, which `ptafuse init` left empty")
    return parse_config(values, where=str(source))


def parse_config(values: dict[str, Any], *, where: str) -> RunConfig:
    """Check a configuration's values.

    Raises:
        ConfigError: lists every wrong key and value, with its place in the file.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(describe_problems(error, RunConfig, where)) from None


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file, with or without the byte order mark that some editors write.

    Raises:
        ConfigError: it is not UTF-8, or not TOML; says where, and what to write instead where that is known.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it with the encoding UTF-8 (Windows PowerShell "
            "writes UTF-16 with `>`; use `Set-Content -Encoding utf8`)"
        ) from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {describe_toml_error(str(error), text)}") from None


def shipped_configs() -> list[Path]:
    """Return the configurations that come with ptafuse."""
    return sorted(_SHIPPED.glob("*.toml"))


def shipped_sweeps() -> list[Path]:
    """Return the sweeps that come with ptafuse."""
    return sorted((_SHIPPED / "sweeps").glob("*.toml"))


def find_toml(path: Path, shipped: list[Path], kind: str) -> Path:
    """Return a file by its path, or a shipped one by its name, its stem, or its path in a checkout of ptafuse.

    Args:
        path: path as the user gave it.
        shipped: the files that come with ptafuse.
        kind: kind of file, for the message.

    Raises:
        ConfigError: there is neither; names the shipped ones.
    """
    if path.is_file():
        return path
    for known in shipped:
        if path in (Path(known.name), Path(known.stem), "pipeline" / known.relative_to(_SHIPPED.parent)):
            return known
    names = ", ".join(known.stem for known in shipped)
    raise ConfigError(f"no such {kind}: {path}. Give the path of a TOML file, or one of the shipped ones: {names}")


def config_id(config: RunConfig) -> str:
    """Return 12 hexadecimal digits that identify a resolved configuration, runtime settings included."""
    return hashlib.sha256(config.model_dump_json(by_alias=True).encode()).hexdigest()[:12]


def _unfilled(values: Any, key: str = "") -> Iterator[str]:
    """Yield the dotted keys of the values that are still to be filled in."""
    if values == FILL_IN:
        yield key
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from _unfilled(value, f"{key}.{name}".lstrip("."))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from _unfilled(value, f"{key}.{index}")


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected KEY=VALUE, e.g. --set align.epsilon=0.2")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    where = values
    while "." in key:
        table, key = key.split(".", 1)
        section = where.setdefault(table, {})
        if isinstance(section, list):
            section, key = _entry(section, key, override)
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override}: {table} is not a table")
        where = section
    where[key] = value


def _entry(tables: list[Any], key: str, override: str) -> tuple[dict[str, Any], str]:
    """Find the table of a list, ``[[sources]]`` for one, that a key begins with the name of (which may hold dots).

    Returns:
        The table, and the rest of the key.
    """
    named = {str(table.get("name")): table for table in tables if isinstance(table, dict)}
    for name, table in named.items():
        if key.startswith(f"{name}."):
            return table, key.removeprefix(f"{name}.")
    raise ConfigError(f"--set {override}: {key} begins with no name and a dot; the names are {', '.join(named)}")
