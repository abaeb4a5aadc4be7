"""Find the files of a dataset: on disk, behind any fsspec URL, or on the Hugging Face hub."""

import errno
import functools
import os
from collections.abc import Sequence
from typing import Any, Final

from pipeline.dataset.files import DatasetError, DatasetFiles, is_on_disk
from pipeline.dataset.formats import EXPECTED, LINES, TEXT, format_of
from pipeline.dataset.local import LocalFiles, describe_link, match_files, walk_files
from pipeline.dataset.splits import canonical_split, describe_splits, splits_of
from stages.contract.filesystem import check_reachable, open_filesystem, retry_transient
from stages.shard.config import DatasetConfig

_METADATA: Final = frozenset(
    {
        *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json"),
        *("dataset-metadata.json", "datapackage.json", "croissant.json", "readme.json"),
    }
)
"""Names of files that tools write next to data, in lower case: never documents, whatever the data's format."""
_REMARKS: Final = frozenset(
    {
        *("readme.txt", "license.txt", "licence.txt", "copying.txt", "notice.txt", "citation.txt", "changelog.txt"),
        *("sha256sums.txt", "md5sums.txt", "checksums.txt", "requirements.txt"),
    }
)
"""Names of texts about the data, in lower case: not documents if there are files of another format."""
_ARROW: Final = ".arrow"
_REMEDIES: Final = {
    _ARROW: "Arrow files, as `Dataset.save_to_disk` writes them, are not read: write Parquet, with "
    "`datasets.load_from_disk(FOLDER).to_parquet('corpus.parquet')` (of a DatasetDict one split: `[...]['train'].to_parquet`), "
    "and give that file",
    ".csv": "convert it, e.g. with `pandas.read_csv(FILE).to_parquet('corpus.parquet')`",
    ".tsv": "convert it, e.g. with `pandas.read_csv(FILE, sep='\\t').to_parquet('corpus.parquet')`",
    ".feather": "convert it, e.g. with `pandas.read_feather(FILE).to_parquet('corpus.parquet')`",
    ".mds": "MosaicML's streaming shards are not read: write their samples as Parquet or JSON lines",
    ".bin": "token ids of one tokenizer are not read, because every model has its own tokenizer: give the original text",
    **dict.fromkeys((".zip", ".tar", ".tgz", ".tar.gz", ".7z", ".bz2", ".xz", ".txt.gz", ".txt.zst"), "unpack it"),
}
"""Ending of a name -> what to do with such a file; the longest ending counts."""
_NAMED_FILES: Final = 5


def find_files(dataset: DatasetConfig) -> DatasetFiles:
    """Find the dataset's files, sorted by name; those of a hub dataset's split in the order that the hub gives.

    Files on the hub are not downloaded: like those of any other URL, they are read where a shard needs them. Links on disk are
    followed, and a file that links give several names is read once.

    Raises:
        FileNotFoundError: the file or folder does not exist, or a glob matches nothing.
        DatasetError: a file's format is unknown, or a folder has no file of a known one, or several formats, or none of the
            split.
    """
    if dataset.hub is not None:
        return _hub_files(dataset)
    from fsspec.core import has_magic

    url, setting = str(dataset.path), f"{dataset.section}.path"
    filesystem, root = open_filesystem(url)
    root = root.rstrip("/") or root
    if "://" in url:
        check_reachable(filesystem, root, url)
    kind = _kind(filesystem, root, url)
    root, question, query = root.partition("?") if url.startswith(("http://", "https://")) else (root, "", "")
    local_files = LocalFiles()
    if kind == "file":  # first: a file's name may hold a bracket
        base, local_files.paths = root.rpartition("/")[0], [root]
    elif has_magic(root):
        base = root[: min(root.index(mark) for mark in "*?[" if mark in root)].rpartition("/")[0]
        local_files = _matches(filesystem, root, url)
        _refuse_unreadable(local_files, setting)
        if not local_files.paths:
            raise FileNotFoundError(f"{setting} = {url!r} matches no file; {EXPECTED}")
    elif kind == "directory":
        base = root
        local_files = _in_folder(filesystem, root, url)
        _refuse_unreadable(local_files, setting)
    else:
        link = describe_link(root) if is_on_disk(filesystem) else None
        obstacle = f"is {link}" if link else "is not a file or folder"
        raise FileNotFoundError(
            f"{setting} = {url!r} {obstacle} (looked for {root}): correct it; a dataset of the Hugging Face hub is named by "
            f"{dataset.section}.hub and {dataset.section}.revision"
        )
    names = {path[len(base) :].lstrip("/"): f"{path}{question}{query}" for path in local_files.paths}
    notes = [f"{path} links to {read_as}: the file is read once" for path, read_as in local_files.doubles.items()]
    if local_files.passed_over:
        notes.append(
            f"{url}: {len(local_files.passed_over)} files are not read, the first one is {local_files.passed_over[0]}: "
            f"{_remedy(local_files.passed_over[0])}"
        )
    if dataset.split is not None:
        names = _of_split(dataset, names, notes)
    kind_name = _one_format(dataset, names, url)
    return DatasetFiles(filesystem, names, kind_name, dataset.section, tuple(notes))


def describe_mixed_splits(dataset: DatasetConfig, files: DatasetFiles) -> str | None:
    """Return a remark for the user if files of several splits are read as one, because no split was chosen."""
    splits = splits_of(list(files.paths)) if dataset.split is None else {}
    if len(splits) < 2:
        return None
    return (
        f"{dataset.path} holds files of several splits, and all are read: {describe_splits(splits)}. Set "
        f"{dataset.section}.split to one of them"
    )


@functools.lru_cache(maxsize=16)
def _hub_files(dataset: DatasetConfig) -> DatasetFiles:
    """Find the files of a hub dataset's split, at its revision; the hub is asked once per process."""
    import datasets
    import fsspec

    try:
        builder = datasets.load_dataset_builder(dataset.hub, name=dataset.subset, revision=dataset.revision)
    except ConnectionError as error:
        if not datasets.config.HF_HUB_OFFLINE:
            raise
        raise DatasetError(
            f"{dataset.section}.hub = {dataset.hub!r} is read on the hub, and HF_HUB_OFFLINE is set: fetch its files where "
            f"there is a network, with `hf download --repo-type dataset {dataset.hub} --local-dir FOLDER`, and give "
            f"{dataset.section}.path = 'FOLDER/.../*.parquet' instead of hub and revision; or unset HF_HUB_OFFLINE"
        ) from error
    splits = {str(split): [str(url) for url in urls] for split, urls in (builder.config.data_files or {}).items()}
    if dataset.split not in splits:
        raise DatasetError(
            f"{dataset.hub} has no split {dataset.split!r}: set {dataset.section}.split to one of "
            f"{', '.join(map(repr, splits))} (to read only a part of it, set {dataset.section}.max_documents)"
        )
    urls = splits[dataset.split]
    filesystem, _ = fsspec.core.url_to_fs(urls[0])
    paths = [filesystem._strip_protocol(url) for url in urls]
    base = len(os.path.commonpath([path.rpartition("/")[0] for path in paths]))
    names = {path[base:].lstrip("/"): path for path in paths}
    return DatasetFiles(filesystem, names, _one_format(dataset, names, str(dataset.hub)), dataset.section)


def _of_split(dataset: DatasetConfig, names: dict[str, str], notes: list[str]) -> dict[str, str]:
    """Return the files of the chosen split; ``notes`` says how many files belong to no split.

    Raises:
        DatasetError: no file is of that split; says which splits there are.
    """
    splits = splits_of(list(names))
    setting = f"{dataset.section}.split"
    wanted = canonical_split(str(dataset.split))
    if wanted not in splits:
        raise DatasetError(
            f"{dataset.path} has no files of the split {dataset.split!r}. The file names show these splits: "
            f"{describe_splits(splits)}. Set {setting} to one of these, or remove it to read all files"
        )
    unnamed = len(names) - sum(map(len, splits.values()))
    if unnamed:
        notes.append(
            f"{dataset.path}: {unnamed} of {len(names)} files belong to no split by their names, and are excluded by "
            f"{setting} = {dataset.split!r}"
        )
    return {name: names[name] for name in splits[wanted]}


def _one_format(dataset: DatasetConfig, names: dict[str, str], url: str) -> str:
    """Return the name of the format of all files.

    Args:
        dataset: dataset that the files belong to.
        names: name of each file -> its path.
        url: location of the files, for messages.

    Raises:
        DatasetError: it is unknown, or there are several.
    """
    formats = {name: format_of(name) for name in names}
    unknown = next((name for name, kind in formats.items() if kind is None), None)
    if unknown is not None:
        raise DatasetError(f"{names[unknown]}: unknown format; {_remedy(unknown) or EXPECTED}")
    kinds = sorted({kind.name for kind in formats.values() if kind is not None})
    if len(kinds) > 1:
        raise DatasetError(f"{url} mixes {', '.join(kinds)}: say which with a glob, e.g. '{url}/*.parquet'")
    if dataset.documents == "lines":
        if kinds != [TEXT]:
            raise DatasetError(
                f'{dataset.section}.documents = "lines" says how .txt files are read, but {url} holds {kinds[0]}: remove it'
            )
        return LINES
    return kinds[0]


def _kind(filesystem: Any, path: str, url: str) -> str | None:
    """Return ``"file"``, ``"directory"`` or None.

    The ``isfile`` of fsspec cannot be used: it reports a failing store as "no file".
    """
    try:
        return retry_transient(filesystem.info, path, url=url)["type"]
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return None
        raise


def _matches(filesystem: Any, pattern: str, url: str) -> LocalFiles:
    """List the files that match a glob, sorted."""
    if is_on_disk(filesystem):
        return _listed(match_files, pattern)
    matches = retry_transient(filesystem.glob, pattern, detail=True, url=url)
    return LocalFiles(sorted(path for path, info in matches.items() if info["type"] == "file"))


def _in_folder(filesystem: Any, root: str, url: str) -> LocalFiles:
    """List the files in and below a folder that are data of a known format, sorted."""
    if is_on_disk(filesystem):
        listed = _listed(walk_files, root)
    else:
        listed = LocalFiles(sorted(retry_transient(filesystem.find, root, url=url)))
    shown = [path for path in listed.paths if not _is_hidden(path[len(root) :])]
    known = _without_metadata([path for path in shown if format_of(path)])
    if not known:
        remedy = next(filter(None, map(_remedy, shown)), None)
        names = ", ".join(path.rpartition("/")[2] for path in shown[:_NAMED_FILES]) or "nothing"
        raise DatasetError(
            f"the folder {url} has no file that can be read: {EXPECTED}; found {names}"
            + (f". {remedy[0].upper()}{remedy[1:]}" if remedy else "")
        )
    doubles = {path: read_as for path, read_as in listed.doubles.items() if read_as in known}
    unreadable = {path: why for path, why in listed.unreadable.items() if not _is_hidden(path[len(root) :])}
    unreadable = {path: why for path, why in unreadable.items() if format_of(path)}
    passed_over = [path for path in shown if format_of(path) is None and _remedy(path) is not None]
    return LocalFiles(known, doubles, unreadable, passed_over)


def _listed(search: Any, path: str) -> LocalFiles:
    """Search on disk.

    Raises:
        DatasetError: a folder may not be listed.
    """
    try:
        listed: LocalFiles = search(path)
    except PermissionError as error:
        raise DatasetError(
            f"the folder {error.filename} cannot be listed ({error.strerror}), so its files would be missing: give "
            "this user the right to read it, or select the files that you want with a glob"
        ) from None
    return listed


def _without_metadata(paths: list[str]) -> list[str]:
    """Leave out files that are about the data, as far as data are left."""
    data = [path for path in paths if path.rpartition("/")[2].lower() not in _METADATA]
    if len({kind.name for kind in map(format_of, data) if kind is not None}) > 1:
        data = [path for path in data if path.rpartition("/")[2].lower() not in _REMARKS]
    return data


def _refuse_unreadable(listed: LocalFiles, setting: str) -> None:
    """Refuse entries that are named like a file of documents but are not one.

    Raises:
        DatasetError: names it.
    """
    for path, why in listed.unreadable.items():
        raise DatasetError(f"{setting}: {path} is {why}: put the file there, or remove it")


def _remedy(name: str) -> str | None:
    endings: Sequence[str] = [ending for ending in _REMEDIES if name.lower().endswith(ending)]
    return _REMEDIES[max(endings, key=len)] if endings else None


def _is_hidden(relative: str) -> bool:
    """Return whether a file is not part of the data: Spark's ``_SUCCESS``, ``.git``, half-written temporaries."""
    return any(name.startswith((".", "_")) for name in relative.split("/"))
