"""Names that a user gives to models, texts, runs and sweeps, and that become names of folders."""

import re
from collections.abc import Iterable
from typing import Annotated, Final

from pydantic import AfterValidator

MAX_LENGTH: Final = 100
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_name(name: str) -> str:
    """Return the name, if a folder can have it on every file system and in every object store.

    Raises:
        ValueError: says what a name may hold, and gives a similar one.
    """
    if _NAME.fullmatch(name) and len(name) <= MAX_LENGTH:
        return name
    similar = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:MAX_LENGTH]
    raise ValueError(
        f"{name!r} cannot name a folder: a name has up to {MAX_LENGTH} letters (a to z, A to Z), digits, '.', '_' and '-', and "
        "begins with a letter or a digit" + (f", e.g. {similar!r}" if similar else "")
    )


Name = Annotated[str, AfterValidator(check_name)]
"""Type of a setting that names folders."""


def find_same_folder(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the first two names that are one folder where the case of letters does not count (macOS, Windows); or None."""
    seen: dict[str, str] = {}
    for name in names:
        if name.casefold() in seen:
            return seen[name.casefold()], name
        seen[name.casefold()] = name
    return None


def refuse_same_folder(plural: str, names: Iterable[str]) -> None:
    """Refuse names that would name one folder.

    Args:
        plural: what has these names, in the plural.
        names: all names.

    Raises:
        ValueError: two are equal, or differ only in the case of letters.
    """
    same = find_same_folder(names)
    if same is None:
        return
    first, second = same
    if first == second:
        raise ValueError(f"{plural} must differ (they name folders), but {first!r} is given twice")
    raise ValueError(
        f"{plural} must differ in more than the case of letters (they name folders, which are one on some disks): rename "
        f"{first!r} or {second!r}"
    )
