"""Find files on this machine's disk, through links, which fsspec's own search silently skips."""

import os
import re
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fsspec.utils import glob_translate

_MAGIC: Final = "*?["
_LOST_AND_FOUND: Final = "lost+found"
"""Folder of the file system itself, which only root may list."""
_MAX_NAMES: Final = 8
"""Names under which a glob looks into one folder: enough to match a name that a link gives it, and cycles of links end."""


@dataclass
class LocalFiles:
    """Result of a search on disk.

    Attributes:
        paths: the files, sorted; a file that has several names through links is there once, under its own name if it is found
            under that.
        doubles: further name of such a file -> the name in ``paths``.
        unreadable: entry that is neither a file nor a folder -> what it is, in words.
        passed_over: files that look like data of a format that is not read.
    """

    paths: list[str] = field(default_factory=list)
    doubles: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    passed_over: list[str] = field(default_factory=list)


def walk_files(root: str) -> LocalFiles:
    """Find the files in a folder and below it, except for hidden ones.

    Links are followed; every folder is read once, so cycles of links end.

    Raises:
        FileNotFoundError: the folder does not exist.
        PermissionError: a folder may not be listed.
    """
    return _walk(root, None, max_names=1, skips_hidden=True)


def match_files(pattern: str) -> LocalFiles:
    """Find the files that match a glob (``**`` for any folders between), links followed.

    Args:
        pattern: an absolute path with at least one of ``*?[``.

    Raises:
        PermissionError: a folder may not be listed.
    """
    folder = pattern[: min(pattern.index(mark) for mark in _MAGIC if mark in pattern)].rpartition("/")[0]
    rest = pattern[len(folder) :].strip("/")
    depth = None if "**" in rest else rest.count("/") + 1
    matches = re.compile(glob_translate(pattern)).match
    if not os.path.isdir(folder or "/"):  # noqa: PTH112  (fsspec gives texts)
        return LocalFiles()
    return _walk(folder or "/", depth, max_names=_MAX_NAMES, is_wanted=lambda path: matches(path) is not None)


def describe_link(path: str) -> str | None:
    """Describe a broken link; None if the path is not a link."""
    return f"a link to {os.readlink(path)}, which does not exist" if os.path.islink(path) else None  # noqa: PTH114, PTH115


def _walk(
    root: str,
    max_depth: int | None,
    *,
    max_names: int,
    skips_hidden: bool = False,
    is_wanted: Callable[[str], bool] | None = None,
) -> LocalFiles:
    """Find files breadth first.

    Args:
        root: the folder to begin in.
        max_depth: levels that are searched, 1 for the folder's own files; None: all.
        max_names: how many times to read a folder that links give several names.
        skips_hidden: pass over ``.git``, Spark's ``_SUCCESS`` and the like.
        is_wanted: whether a path is looked for; None: every one is.
    """
    unreadable: dict[str, str] = {}
    files: list[tuple[str, str]] = []  # name, real path
    links: list[tuple[str, str]] = []
    own_folders, linked_folders = deque([(root, 1)]), deque[tuple[str, int]]()
    num_names: Counter[str] = Counter()
    while own_folders or linked_folders:
        is_linked = not own_folders  # first all folders under their own names, then what links add
        folder, depth = (linked_folders if is_linked else own_folders).popleft()
        real_folder = os.path.realpath(folder)
        num_names[real_folder] += 1
        if num_names[real_folder] > max_names:
            continue
        for entry in os.scandir(folder):
            if skips_hidden and (entry.name.startswith((".", "_")) or entry.name == _LOST_AND_FOUND):
                continue
            path = f"{folder.rstrip('/')}/{entry.name}"
            through_link = is_linked or entry.is_symlink()
            kind = _kind(entry)
            if kind == "folder" and (max_depth is None or depth < max_depth):
                (linked_folders if through_link else own_folders).append((path, depth + 1))
            elif kind == "folder" or (is_wanted is not None and not is_wanted(path)):
                continue
            elif kind == "file":
                real = os.path.realpath(path) if entry.is_symlink() else f"{real_folder.rstrip('/')}/{entry.name}"
                (links if through_link else files).append((path, real))
            else:
                unreadable[path] = kind
    names = {real: path for path, real in files}
    doubles = {}
    for path, real in sorted(links):
        if names.setdefault(real, path) != path:
            doubles[path] = names[real]
    return LocalFiles(sorted(names.values()), doubles, unreadable)


def _kind(entry: os.DirEntry[str]) -> str:
    """Return ``"file"``, ``"folder"``, or what else it is, in words."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError as error:  # a link to itself
        return f"a broken link ({error.strerror})"
    return describe_link(entry.path) or "neither a file nor a folder"
