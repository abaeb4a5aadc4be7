"""Pickled weights (``pytorch_model.bin``) to safetensors: the only place that reads a pickle, and it runs none of its code.

``torch.load(weights_only=True)`` unpickles tensors and plain containers, and refuses whatever else a pickle may ask for. Every
tensor is read back from the new files and compared before these get their names.
"""

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from zipfile import is_zipfile

from stages.models.config import TOKENIZER_FILES
from stages.models.weights import INDEX_FILE, SINGLE_FILE, WeightFileError, read_index, refuse_stand_in

PICKLED_FILE: Final = "pytorch_model.bin"
PICKLED_INDEX: Final = "pytorch_model.bin.index.json"
MAX_SHARD_BYTES: Final = 5 * 10**9
"""Largest size of a file's tensors; a larger tensor has a separate file. transformers shards a model in the same way."""

_FUNCTION: Final = re.compile(r"GLOBAL (\S+)")
"""Name of a forbidden function in torch's message about a pickle."""
_WEIGHT_SUFFIXES: Final = (".bin", ".pt", ".pth", ".safetensors", ".h5", ".msgpack", ".onnx", ".gguf")
_WEIGHT_INDEXES: Final = (".bin.index.json", ".safetensors.index.json")


@dataclass(frozen=True)
class Converted:
    """Result of a conversion.

    Attributes:
        folder: folder of the new files.
        files: names of the weight files.
        num_tensors: number of tensors, all compared with the pickled ones.
        num_bytes: size of the tensors.
    """

    folder: Path
    files: tuple[str, ...]
    num_tensors: int
    num_bytes: int


@dataclass(frozen=True)
class _Pickled:
    """A tensor of a pickled file.

    Attributes:
        file: file that holds the tensor.
        name: name of the tensor.
        num_bytes: size of the tensor.
    """

    file: Path
    name: str
    num_bytes: int


def download(hub: str, revision: str) -> Path:
    """Fetch a model's pickled weights, configuration and tokenizer into the hub's cache.

    Args:
        hub: the model's id.
        revision: a commit, tag or branch.

    Returns:
        The folder in the cache.

    Raises:
        ValueError: the hub has no such model or revision, or does not answer and the cache has none.
    """
    from huggingface_hub import snapshot_download

    patterns = ["pytorch_model*.bin", "*.json", "*.py", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(hub, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # of the hub's client: not there, gated, no network, not an id
        raise ValueError(
            f"{hub}@{revision} cannot be fetched: {str(error).strip().splitlines()[0]}. Give a folder, or the id and revision "
            "of a model of the hub"
        ) from error


def convert(
    folder: Path,
    output: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_file: Callable[[str], None] | None = None,
) -> Converted:
    """Write a folder's pickled weights as safetensors.

    Tensors that share memory (a tied head) are written each by itself: every name stays, whatever a reader ties again.

    Args:
        folder: folder of the model, with config.json and ``pytorch_model.bin``, or its shards with their index.
        output: folder for the new files: ``folder`` itself, or a folder that is missing or empty, which also gets the
            configuration and the tokenizer.
        max_shard_bytes: tensors of a file, at most.
        on_file: called with the name of each new file when it is written and compared.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: the folder holds no model with pickled weights.
        FileExistsError: there are safetensors, or other files in ``output``; existing files are not overwritten.
        WeightFileError: a file does not load as a dictionary of tensors without running code, or is not what the index says.
        OSError: the disk has too little room.
    """
    from safetensors.torch import save_file

    files = _pickled_files(folder)
    _refuse_to_overwrite(folder, output)
    tensors = list(_list_tensors(files, folder))
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    _require_room(output, num_bytes)
    groups = _groups(tensors, max_shard_bytes)
    names = (
        [SINGLE_FILE]
        if len(groups) == 1
        else [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    )
    is_new = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    # In the destination, so that the files are renamed and not copied; a folder that is killed half-way holds no weights.
    temporary = output / f".convert-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        for name, group in zip(names, groups, strict=True):
            values, digests = _read(group)
            save_file(values, temporary / name, metadata={"format": "pt"})
            del values
            _compare(temporary / name, digests)
            if on_file is not None:
                on_file(name)
        if len(names) > 1:
            weight_map = {tensor.name: name for name, group in zip(names, groups, strict=True) for tensor in group}
            index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (temporary / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        if output.resolve() != folder.resolve():
            _copy_other_files(folder, temporary)
        # The index, or the only weight file, comes last: without it nobody takes the folder for a model.
        last = INDEX_FILE if len(names) > 1 else SINGLE_FILE
        for file in sorted(temporary.iterdir(), key=lambda file: (file.name == last, file.name)):
            file.rename(output / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_new and not any(output.iterdir()):
            output.rmdir()
    return Converted(output, tuple(names), len(tensors), num_bytes)


def _pickled_files(folder: Path) -> list[Path]:
    """Return the files that hold a folder's pickled weights: those that the index names, or the only one."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder (expected one with config.json and {PICKLED_FILE}); for a model of the Hugging Face hub "
            "give its id with --revision"
        )
    present = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no model configuration (expected config.json); it holds: {present}")
    index = folder / PICKLED_INDEX
    if index.exists():
        # A name with a folder in it could lead out of this one.
        names = sorted({Path(name).name for name in read_index(index).values()})
        absent = [name for name in names if not (folder / name).exists()]
        if absent:
            raise WeightFileError(
                index, f"names {absent[0]}, which does not exist", f"all {len(names)} files", "Fetch them"
            )
        return [folder / name for name in names]
    if not (folder / PICKLED_FILE).exists():
        raise FileNotFoundError(
            f"{folder} holds no pickled weights (expected {PICKLED_FILE}, or shards with {PICKLED_INDEX}); it holds: {present}"
        )
    return [folder / PICKLED_FILE]


def _refuse_to_overwrite(folder: Path, output: Path) -> None:
    if output.resolve() == folder.resolve():
        existing = sorted(file.name for pattern in ("*.safetensors", INDEX_FILE) for file in output.glob(pattern))
        if existing:
            raise FileExistsError(
                f"{output} already holds {existing[0]}, and existing files are not overwritten: use the folder as it is, "
                "or give another one with --output"
            )
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"{output} already exists, and existing files are not overwritten: give --output a folder that is empty or "
            "does not exist"
        )


def _require_room(output: Path, num_bytes: int) -> None:
    parent = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise OSError(
            f"{output}: the tensors take {num_bytes / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB free: free some "
            "space, or give --output a folder on another disk"
        )


def _load(file: Path) -> dict[str, Any]:
    """Return the tensors of a pickled file. Of the newer, zipped kind they are mapped: none is in memory before it is read."""
    import torch

    refuse_stand_in(file)
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except Exception as error:  # whatever a damaged or hostile file leads to
        # Not torch's own words: they advise to load the file without this check.
        function = _FUNCTION.search(str(error))
        if function is not None:
            raise WeightFileError(
                file,
                f"refers to {function[1]}, which can run arbitrary code, so the file was not loaded",
                "only tensors",
                "Ask the author of the file for safetensors",
            ) from error
        reason = (
            "not a pickle of tensors" if "Weights only" in str(error) else (str(error).splitlines() or ["no reason"])[0]
        )
        raise WeightFileError(
            file, f"cannot be read ({reason})", "a file of tensors written by torch.save", "Fetch the file again"
        ) from error
    if not isinstance(loaded, dict) or not loaded:
        raise _not_tensors(file, f"a {type(loaded).__name__}" if not isinstance(loaded, dict) else "nothing")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise _not_tensors(file, f"a {type(tensor).__name__} under {name!r}")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise _not_tensors(file, f"a sparse or quantised tensor under {name!r}")
    return dict(loaded)


def _not_tensors(file: Path, contents: str) -> WeightFileError:
    return WeightFileError(
        file,
        f"holds {contents}",
        "a dictionary of names and dense tensors, as save_pretrained writes it",
        "Save the model's state_dict, or load it with its own library and save_pretrained it",
    )


def _list_tensors(files: Sequence[Path], folder: Path) -> Iterator[_Pickled]:
    """List every tensor in the order of the files.

    Raises:
        WeightFileError: a name is in two files, or the index names a tensor that its file does not hold.
    """
    seen: dict[str, Path] = {}
    for file in files:
        for name, tensor in _load(file).items():
            if name in seen:
                raise WeightFileError(
                    file, f"holds {name}, and so does {seen[name].name}", "each tensor once", "Fetch both"
                )
            seen[name] = file
            yield _Pickled(file, name, tensor.numel() * tensor.element_size())
    index = folder / PICKLED_INDEX
    for name, file_name in read_index(index).items() if index.exists() else ():
        if name not in seen:
            raise WeightFileError(index, f"names {name}, which {file_name} does not hold", "every tensor", "Fetch both")


def _groups(tensors: Sequence[_Pickled], max_bytes: int) -> list[list[_Pickled]]:
    """Divide tensors, in order, among files of bounded size."""
    groups: list[list[_Pickled]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    return groups


def _read(group: Sequence[_Pickled]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the tensors of a new file, none sharing memory with another, and the digest of each."""
    import torch

    values: dict[str, Any] = {}
    for file in dict.fromkeys(tensor.file for tensor in group):
        loaded = _load(file)
        for tensor in group:
            if tensor.file == file:
                # A view of a larger tensor, or a second name of one, becomes a separate tensor; safetensors has no views.
                values[tensor.name] = loaded[tensor.name].detach().clone(memory_format=torch.contiguous_format)
        del loaded
    return values, {name: _digest(value) for name, value in values.items()}


def _compare(file: Path, digests: dict[str, str]) -> None:
    """Read a new file back.

    Raises:
        WeightFileError: a tensor differs from the pickled one.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt", device="cpu") as written:
        names = set(written.keys())
        wrong = names ^ digests.keys() or {name for name in names if _digest(written.get_tensor(name)) != digests[name]}
    if wrong:
        raise WeightFileError(file, f"{min(wrong)} differs when it is read back", "the same tensors", "Check the disk")


def _digest(tensor: Any) -> str:
    """Return the sha256 of a tensor's type, shape and bytes."""
    import torch

    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.numel():
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _copy_other_files(folder: Path, output: Path) -> None:
    """Copy configuration, tokenizer and whatever else is not weights; links to the cache's files become files."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.endswith((*_WEIGHT_SUFFIXES, *_WEIGHT_INDEXES)):
            shutil.copyfile(file, output / file.name)
