"""Infer the split of a file from its name, as the Hugging Face hub does (``datasets.data_files``)."""

import re
from collections.abc import Mapping, Sequence
from typing import Final

_KEYWORDS: Final = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEPARATORS: Final = r"[-._ 0-9]"
_WORDS: Final = {
    split: re.compile(rf"(?:^|{_SEPARATORS})(?:{'|'.join(words)})(?:{_SEPARATORS}|$)")
    for split, words in _KEYWORDS.items()
}
_NUMBERED: Final = re.compile(r"(.+)-\d{5}-of-\d{5}")


def splits_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Group files by the split that their names say.

    A folder's name decides before the file's. ``train_sft-00000-of-00002.parquet`` is of the split ``train_sft``. Where no
    name says a split, all files are of ``train``; where some do, the others are of none.

    Args:
        names: names of the files, below the dataset's folder.

    Returns:
        split -> its files, in the order of ``names``.
    """
    splits: dict[str, list[str]] = {}
    for name in names:
        split = _split_of(name)
        if split is not None:
            splits.setdefault(split, []).append(name)
    return splits or {"train": list(names)}


def canonical_split(split: str) -> str:
    """Return the name of a split that has several: ``dev`` is ``validation``."""
    return next((name for name, words in _KEYWORDS.items() if split in words), split)


def describe_splits(splits: Mapping[str, Sequence[str]]) -> str:
    """Return what splits there are, in words: ``train (3 files, train-0.parquet the first)``."""
    return ", ".join(
        f"{split!r} ({len(names)} file{'s' if len(names) > 1 else ''}, {names[0]} the first)"
        for split, names in splits.items()
    )


def _split_of(name: str) -> str | None:
    *folders, file = name.lower().split("/")
    for folder in reversed(folders):
        split = _named(folder)
        if split is not None:
            return split
    numbered = _NUMBERED.match(file)
    if numbered is not None and _named(numbered[1].replace("_", "-")) is not None:
        return canonical_split(numbered[1])
    return _named(file)


def _named(word: str) -> str | None:
    return next((split for split, pattern in _WORDS.items() if pattern.search(word)), None)
