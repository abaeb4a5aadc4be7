"""Explain errors in a configuration in the words of its file: what was found, what is expected, what to write."""

import difflib
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from stages.contract.fingerprint import Settings

_BOUNDS: Final = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "of at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "of at most"),
}
_WORDS: Final = {
    str: "a text in quotes",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path in quotes",
}
_TOML_HINTS: Final = (
    (
        "twice",
        "a section can appear only once; tables that can be repeated are written with two brackets: [[sources]]",
    ),
    ("overwrite", "a setting or a section is given twice: remove one, or write [[sources]] with two brackets"),
    ("hex value", "in double quotes a backslash starts an escape sequence: put a Windows path in single quotes"),
    ("'\\'", "in double quotes a backslash starts an escape sequence: put a Windows path in single quotes"),
    ("Invalid value", 'texts are written in quotes (name = "my-run"), and true and false are written in lower case'),
)
"""Part of a message of ``tomllib`` -> what to write instead."""
_SHOWN_CHARACTERS: Final = 60


class _Location(NamedTuple):
    """Location of a problem in a configuration.

    Attributes:
        keys: keys as written in the file; a number is an index in an array of tables, from 0.
        annotation: type that is expected there; None: the key is unknown.
        field: the setting's declaration, if it is one.
        section: class of the section that contains it.
    """

    keys: tuple[str | int, ...]
    annotation: Any
    field: FieldInfo | None
    section: type[Settings]

    @property
    def name(self) -> str:
        return ".".join(map(str, self.keys)) or "(the file)"

    @property
    def table(self) -> str:
        """Keys as written in the head of a section, without the numbers of tables."""
        return ".".join(key for key in self.keys if isinstance(key, str))


def describe_problems(error: ValidationError, model: type[Settings], where: str) -> str:
    """Describe every wrong setting on a separate line.

    Args:
        error: error raised when the file's values were checked.
        model: the class of the whole file.
        where: the file.
    """
    lines: dict[tuple[str | int, ...], str] = {}
    for problem in error.errors(include_url=False):
        location = _find(model, problem["loc"])
        if location.keys in lines and len(problem["loc"]) > len(location.keys):
            continue  # another of the types that this setting may have: the first line names them all
        if problem["type"] == "too_short" and any(keys[: len(location.keys)] == location.keys for keys in lines):
            continue  # wrong tables are not counted, and each has a separate line
        lines[location.keys if location.keys else (len(lines),)] = (
            f"  {location.name}: {_describe(problem, location, model)}"
        )
    return "\n".join([f"{where}: {len(lines)} wrong setting(s)", *lines.values()])


def describe_toml_error(message: str, text: str) -> str:
    """Return a message of ``tomllib`` with the line that it speaks of, and what to write instead where that is known."""
    hint = next((f". {hint[0].upper()}{hint[1:]}" for fragment, hint in _TOML_HINTS if fragment in message), "")
    number = re.search(r"at line (\d+)", message)
    lines = text.splitlines()
    line = lines[int(number[1]) - 1].strip() if number and int(number[1]) <= len(lines) else ""
    return message + (f": {_shortened(line)}" if line else "") + hint


def _find(model: type[Settings], loc: Sequence[str | int]) -> _Location:
    """Follow pydantic's ``loc`` as far as it consists of keys; after them it names types of a union."""
    location = _Location((), model, None, model)
    for key in loc:
        annotation = location.annotation
        if isinstance(key, int):
            item = next((args[0] for args in _argument_lists(annotation, tuple, list)), None)
            if item is None:
                break
            location = location._replace(keys=(*location.keys, key), annotation=item)
            continue
        section = _section_in(annotation)
        if section is not None:
            field = next((field for name, field in section.model_fields.items() if key in (field.alias, name)), None)
            known = None if field is None else field.annotation
            location = _Location((*location.keys, key), known, field, section)
            continue
        values = next((args[1] for args in _argument_lists(annotation, dict)), None)
        if values is None:
            break
        location = location._replace(keys=(*location.keys, key), annotation=values)
    return location


def _describe(problem: Any, location: _Location, model: type[Settings]) -> str:
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        return _describe_unknown(location, model)
    if kind == "missing":
        return _describe_missing(location)
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"expected a number {words} {problem['ctx'][name]:g}; found {_found(value)}"
    if kind == "finite_number":
        return f"expected a finite number; found {value}"
    if kind == "too_short":
        return f"expected at least {problem['ctx']['min_length']}; found {problem['ctx']['actual_length']}" + (
            f": write a section [[{location.table}]]" if _section_in(location.annotation) else ""
        )
    is_table, is_list = isinstance(value, dict), isinstance(value, list | tuple)
    if is_table and _is_list_of_sections(location.annotation):
        return f"write [[{location.table}]] with two brackets: it can be repeated"
    if is_list and _section_in(location.annotation) is not None and not _is_list_of_sections(location.annotation):
        return f"write [{location.table}] with one bracket: it cannot be repeated"
    if location.annotation is None:
        return str(problem["msg"])
    choices = _choices(location.annotation)
    near = _near(value, [choice for choice in choices if isinstance(choice, str)])
    return f"expected {_expected(location)}; found {_found(value)}" + (f": did you mean {near!r}?" if near else "")


def _describe_unknown(location: _Location, model: type[Settings]) -> str:
    key = str(location.keys[-1])
    known = _setting_names(location.section)
    near = _near(key, known)
    elsewhere = [table for table, section in _sections(model) if key in _setting_names(section)]
    if near:
        return f"unknown setting; did you mean {near!r}?"
    if elsewhere:
        tables = " or ".join(
            f"[{table}]" if table else "the top of the file, before the first section" for table in elsewhere
        )
        hint = f"it belongs in {tables}; known settings: "
    else:
        hint = "known settings: "
    return f"unknown setting; {hint}{', '.join(known)}"


def _describe_missing(location: _Location) -> str:
    description = location.field.description if location.field is not None else None
    if _is_list_of_sections(location.annotation):
        expected = f"write a section [[{location.table}]], one or more"
    elif _section_in(location.annotation) is not None:
        expected = f"write a section [{location.table}]"
    else:
        expected = f"expected {_expected(location)}"
    return f"is missing; {expected}" + (f" ({description.rstrip('.')})" if description else "")


def _expected(location: _Location) -> str:
    """Describe the values that a setting takes."""
    annotation = location.annotation
    choices = _choices(annotation)
    words = [f"one of {', '.join(map(repr, choices))}" if len(choices) > 1 else repr(choices[0])] if choices else []
    for option in _options(annotation):
        origin, section = get_origin(option) or option, _section_in(option)
        if section is not None and origin in (tuple, list):
            words.append(f"sections [[{location.table}]]")
        elif section is not None:
            brackets = ("[[", "]]") if isinstance(location.keys[-1], int) else ("[", "]")
            words.append(f"a section {brackets[0]}{location.table}{brackets[1]}{_required(section)}")
        elif origin in (tuple, list):
            items = _options(next(iter(get_args(option)), str))
            item = next((_WORDS[kind] for kind in items if kind in _WORDS), "values")
            words.append(f"a list of {item.removeprefix('a ').replace('text', 'texts').replace('number', 'numbers')}")
        elif origin is dict:
            words.append("a table of names and values")
        elif option in _WORDS:
            words.append(_WORDS[option])
    return " or ".join(words) or "another value"


def _required(section: type[Settings]) -> str:
    names = [field.alias or name for name, field in section.model_fields.items() if field.is_required()]
    return f" with {', '.join(names)} and others" if names else ""


def _found(value: Any) -> str:
    """Describe a value as the file has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {_shortened(value)!r}"
    if isinstance(value, dict):
        return "a section or table"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return "nothing" if value is None else _shortened(str(value))


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _near(value: Any, known: Sequence[str]) -> str | None:
    if not isinstance(value, str):
        return None
    lower = {name.lower(): name for name in reversed(known)}
    matches = difflib.get_close_matches(value.lower(), lower, n=1, cutoff=0.7)
    matches += [name for name in lower if min(len(name), len(value)) > 2 and value.lower().startswith(name)]
    return lower[matches[0]] if matches else None


def _setting_names(section: type[Settings]) -> list[str]:
    return sorted(field.alias or name for name, field in section.model_fields.items())


def _sections(model: type[Settings], table: str = "") -> Iterator[tuple[str, type[Settings]]]:
    """Yield every section of a file: its head in the file, and its class."""
    yield table, model
    for name, field in model.model_fields.items():
        section = _section_in(field.annotation)
        if section is not None:
            yield from _sections(section, f"{table}.{field.alias or name}".strip("."))


def _options(annotation: Any) -> list[Any]:
    """Return the types of a union, without None; literals are left out."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _options(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [option for member in get_args(annotation) for option in _options(member)]
    return [] if origin is Literal or annotation is type(None) else [annotation]


def _choices(annotation: Any) -> list[Any]:
    """Return the values that literals of an annotation allow."""
    origin = get_origin(annotation)
    if origin is Literal:
        return list(get_args(annotation))
    if origin in (Union, types.UnionType, Annotated):
        return [choice for member in get_args(annotation) for choice in _choices(member)]
    return []


def _argument_lists(annotation: Any, *origins: type) -> list[tuple[Any, ...]]:
    return [get_args(option) for option in _options(annotation) if get_origin(option) in origins]


def _section_in(annotation: Any) -> type[Settings] | None:
    """Return the section that a setting is, or that its tables are; None for a plain value."""
    for option in _options(annotation):
        item = next(iter(get_args(option)), None) if get_origin(option) in (tuple, list) else option
        if isinstance(item, type) and issubclass(item, Settings):
            return item
    return None


def _is_list_of_sections(annotation: Any) -> bool:
    return any(get_origin(option) in (tuple, list) and _section_in(option) for option in _options(annotation))
