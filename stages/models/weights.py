"""Safetensors files of a model: which are read, which holds which tensor, and what their headers say."""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stages.models.config import ModelConfig

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"

_LENGTH_BYTES: Final = 8
_MAX_HEADER_BYTES: Final = 100_000_000  # the safetensors library's own limit

_REFETCH: Final = "Fetch the file again"


class WeightFileError(ValueError):
    """Error of a weight file that cannot be read.

    Attributes:
        file: file that is damaged.
        found: actual content of the file.
        expected: expected content of the file.
        remedy: remedy, as a sentence without its full stop.
    """

    def __init__(self, file: Path, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{file}: {found}; expected {expected}. {remedy}")
        self.file, self.found, self.expected, self.remedy = file, found, expected, remedy


@dataclass(frozen=True)
class StoredTensor:
    """Tensor as described by a file's header.

    Attributes:
        dtype: name of the type in safetensors, such as ``"BF16"``.
        shape: size of each dimension.
        file: name of the file that holds it.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder that are read, whatever else is there.

    transformers reads ``model.safetensors``, and where there is none the files that the index names. A folder may hold the
    same weights once more under other names (``consolidated.safetensors``).

    Returns:
        The files, which need not exist; empty for a folder with neither.

    Raises:
        WeightFileError: the index is damaged.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists() or single.is_symlink():  # a link may be dangling
        return [single]
    return [folder / name for name in sorted(set(read_index(index).values()))] if index.exists() else []


def read_index(index: Path) -> dict[str, str]:
    """Read an index: each tensor's name with the name of its file.

    Raises:
        WeightFileError: the file is not an index.
    """
    refuse_stand_in(index)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightFileError(
            index, f"not an index of safetensors ({error})", "JSON with `weight_map`", _REFETCH
        ) from error


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read what a safetensors file holds from its header: 8 bytes of length, then JSON. No tensor is read.

    Raises:
        WeightFileError: it is missing, cut short, or something else.
    """
    refuse_stand_in(file)
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(_LENGTH_BYTES)
        length = struct.unpack("<Q", start)[0] if len(start) == _LENGTH_BYTES else 0
        raw = opened.read(length) if 2 <= length <= _MAX_HEADER_BYTES else b""
    if not raw.startswith(b"{"):
        raise WeightFileError(
            file, f"not a safetensors file (it begins with {start!r})", "the length of a header", _REFETCH
        )
    if len(raw) < length:
        raise WeightFileError(
            file, f"cut short: {size:,} bytes, and its header alone takes {length:,}", "a whole file", _REFETCH
        )
    try:
        header = json.loads(raw)
        stored = {
            name: StoredTensor(str(entry["dtype"]), tuple(map(int, entry["shape"])), file.name)
            for name, entry in header.items()
            if name != "__metadata__"
        }
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise WeightFileError(
            file, f"not a safetensors file (its header is broken: {error})", "a JSON header", _REFETCH
        ) from error
    whole = _LENGTH_BYTES + length + max(ends, default=0)
    if size < whole:
        raise WeightFileError(file, f"cut short: {size:,} of {whole:,} bytes", "a whole file", _REFETCH)
    return stored


def refuse_stand_in(file: Path) -> None:
    """Refuse a file that is missing, or is only a placeholder (a Git LFS pointer, an error page).

    Raises:
        WeightFileError: says what it is.
    """
    if not file.is_file():
        state = "a link to a file that does not exist" if file.is_symlink() else "missing"
        raise WeightFileError(file, state, "a file", _REFETCH)
    with file.open("rb") as opened:
        start = opened.read(64)
    if start.startswith((b"version https://git-lfs", b"/annex/objects/")) or b"/annex/objects/" in start:
        raise WeightFileError(
            file,
            f"a Git LFS pointer ({file.stat().st_size} bytes of text)",
            "the file itself",
            f"Run `git lfs pull` in {file.parent}, or fetch the file again",
        )
    if start[:15].lower().startswith((b"<!doctype", b"<html")):
        raise WeightFileError(file, "an HTML page", "the file itself", f"{_REFETCH}; the hub may require you to log in")
    if not start:
        raise WeightFileError(file, "empty", "the file itself", _REFETCH)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor that is read from a folder, by its name.

    Raises:
        WeightFileError: a file is missing or broken.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        tensors |= read_header(file)
    return tensors


def tensor_files(model: ModelConfig) -> Mapping[str, str]:
    """Return each tensor's name with the name of its file, for ``model_file``; empty for a model without safetensors.

    Raises:
        OSError: the hub cannot be reached.
    """
    from safetensors import safe_open

    if model.is_gguf:
        return {}
    file = model_file(model, SINGLE_FILE)  # first, as transformers does: a folder may have both
    if file is not None:
        with safe_open(str(file), framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), file.name)
    index = model_file(model, INDEX_FILE)
    return {} if index is None else read_index(index)


def model_file(model: ModelConfig, name: str) -> Path | None:
    """Return one of the model's files, from its folder or from the hub (or its cache); None if it has no such file."""
    from transformers.utils.hub import cached_file

    if model.path is not None:
        file = model.path / name
        return file if file.exists() else None
    cached = cached_file(model.hub, name, revision=model.revision, _raise_exceptions_for_missing_entries=False)
    return None if cached is None else Path(cached)
