"""Find the files of a dataset: on disk, behind any fsspec URL, or on the Hugging Face hub."""

import functools
import os
from typing import Any

from pipeline.dataset.files import DatasetError, DatasetFiles
from pipeline.dataset.formats import EXPECTED, FORMATS, Format, format_of
from stages.contract.filesystem import check_reachable, open_filesystem, patiently
from stages.shard.config import DatasetConfig


def find_files(dataset: DatasetConfig) -> DatasetFiles:
    """The dataset's files, sorted by name; those of a hub dataset's split in the order that the hub gives.

    Files on the hub are not downloaded: like those of any other URL, they are read where a shard needs them.

    Raises:
        FileNotFoundError: there is no such file or folder, or a glob matches nothing.
        DatasetError: a file's format is unknown, or a folder has no file of a known one, or several formats.
    """
    if dataset.hub is not None:
        return _hub_files(dataset)
    from fsspec.core import has_magic

    url = str(dataset.path)
    filesystem, root = open_filesystem(url)
    root = root.rstrip("/") or root
    if "://" in url:
        check_reachable(filesystem, root, url)
    kind = _kind(filesystem, root, url)
    if kind == "file":  # first: a file's name may hold a bracket
        base, found = root.rpartition("/")[0], [root]
    elif has_magic(root):
        base = root[: min(root.index(mark) for mark in "*?[" if mark in root)].rpartition("/")[0]
        matches = patiently(filesystem.glob, root, detail=True, url=url)
        found = sorted(path for path, info in matches.items() if info["type"] == "file")
        if not found:
            raise FileNotFoundError(f"{dataset.section}.path = {url!r} matches no file; {EXPECTED}")
    elif kind == "directory":
        base = root
        found = _in_folder(filesystem, root, url)
    else:
        raise FileNotFoundError(
            f"{dataset.section}.path = {url!r} is no file or folder (looked for {root}): correct it; a dataset of the Hugging "
            f"Face hub is named by {dataset.section}.hub and {dataset.section}.revision"
        )
    names = {path[len(base) :].lstrip("/"): path for path in found}
    return DatasetFiles(filesystem, names, _one_format(found, url).name, dataset.section)


@functools.lru_cache(maxsize=16)
def _hub_files(dataset: DatasetConfig) -> DatasetFiles:
    """The files of a hub dataset's split, at its revision: asked for once a process."""
    import datasets
    import fsspec

    builder = datasets.load_dataset_builder(dataset.hub, name=dataset.subset, revision=dataset.revision)
    splits = {str(split): [str(url) for url in urls] for split, urls in (builder.config.data_files or {}).items()}
    if dataset.split not in splits:
        raise DatasetError(
            f"{dataset.hub} has no split {dataset.split!r}: set {dataset.section}.split to one of "
            f"{', '.join(map(repr, splits))} (for a part of it give {dataset.section}.max_documents)"
        )
    urls = splits[dataset.split]
    filesystem, _ = fsspec.core.url_to_fs(urls[0])
    paths = [filesystem._strip_protocol(url) for url in urls]
    base = len(os.path.commonpath([path.rpartition("/")[0] for path in paths]))
    names = {path[base:].lstrip("/"): path for path in paths}
    return DatasetFiles(filesystem, names, _one_format(paths, str(dataset.hub)).name, dataset.section)


def _one_format(found: list[str], url: str) -> Format:
    """Return the format of all files.

    Raises:
        DatasetError: it is unknown, or there are several.
    """
    formats = {path: format_of(path) for path in found}
    unknown = next((path for path, kind in formats.items() if kind is None), None)
    if unknown is not None:
        raise DatasetError(f"{unknown}: unknown format; {EXPECTED}")
    names = sorted({kind.name for kind in formats.values() if kind is not None})
    if len(names) > 1:
        raise DatasetError(f"{url} mixes {', '.join(names)}: say which with a glob, e.g. '{url}/*.parquet'")
    return FORMATS[names[0]]


def _kind(filesystem: Any, path: str, url: str) -> str | None:
    """``"file"``, ``"directory"``, or None: fsspec's own ``isfile`` takes a failure of the store for "there is none"."""
    try:
        return patiently(filesystem.info, path, url=url)["type"]
    except FileNotFoundError:
        return None


def _in_folder(filesystem: Any, root: str, url: str) -> list[str]:
    """The files of a folder and those below it whose format is known, sorted."""
    found = [path for path in sorted(patiently(filesystem.find, root, url=url)) if not _is_hidden(path[len(root) :])]
    known = [path for path in found if format_of(path)]
    if not known:
        names = ", ".join(path.rpartition("/")[2] for path in found[:5]) or "nothing"
        raise DatasetError(f"the folder {url} has no file that can be read: {EXPECTED}; found {names}")
    return known


def _is_hidden(relative: str) -> bool:
    """Spark's ``_SUCCESS``, ``.git``, half-written temporaries: no part of the data."""
    return any(part.startswith((".", "_")) for part in relative.split("/"))
