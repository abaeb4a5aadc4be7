"""Examine a model before anything is computed: its files are read, its weights are not."""

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from stages.models.config import PLAIN, ModelConfig, PretrainedFiles, embedding_rows
from stages.models.gguf_header import check_gguf
from stages.models.preflight.architecture import architecture_problems, build_skeleton, first_line, settings_problems
from stages.models.preflight.hub import pickled_alone
from stages.models.preflight.problem import Problem
from stages.models.preflight.remember import examine_once
from stages.models.preflight.tensors import compare_tensors, tensor_problems
from stages.models.preflight.tokenizer_files import tokenizer_problems
from stages.models.quantization import quantization_method
from stages.models.weights import (
    SINGLE_FILE,
    StoredTensor,
    WeightFileError,
    read_header,
    refuse_stand_in,
    weight_files,
)

CONFIG_FILE: Final = "config.json"
ADAPTER_FILE: Final = "adapter_config.json"

_GGUF_PACKAGES: Final = ("gguf", "accelerate")


def examine(
    model: ModelConfig,
    *,
    trained: bool = False,
    isolated: bool = False,
    has_weights: bool = True,
    may_ask_hub: bool = True,
) -> list[Problem]:
    """Find what is wrong with a model's files.

    A model of the hub is examined as far as its files are in the local cache. What is not there is not missed, unless the hub
    says that it has no weights of a kind that is read.

    Args:
        model: which model.
        trained: whether the run trains it.
        isolated: whether it is trained on packed documents that do not see each other.
        has_weights: whether its weights are wanted here; a server may have them.
        may_ask_hub: load a tokenizer that is on the hub, and ask the hub which weights it has where they are not in the cache.

    Returns:
        The problems; empty if the model can be used, as far as its files show.
    """
    try:
        model.check()
    except FileNotFoundError as error:
        return [Problem(model.name, "", str(error))]
    if model.is_gguf:
        problems = list(_gguf_problems(model))
    else:
        folder = local_folder(model)
        problems = (
            []
            if folder is None
            else list(_model_problems(model, folder, trained=trained, isolated=isolated, has_weights=has_weights))
        )
        if has_weights and may_ask_hub and model.path is None:
            problems += pickled_alone(model, folder)
    files = model.tokenizer_files
    if files.path is None and not may_ask_hub:
        return problems
    folder = None if files.is_gguf else local_folder(files)
    place = files.path if files.is_gguf else folder
    if place is None:
        return problems  # of the hub, and not in the cache
    needed = place if files.is_gguf else place / CONFIG_FILE  # it says of which kind the tokenizer is
    if any(problem.file == str(needed) for problem in problems):
        return problems
    num_rows = embedding_rows(model)
    return problems + examine_once(
        ["tokenizer", model.model_dump_json(), num_rows],
        [place, *([Path(model.chat_template)] if model.chat_template not in (None, PLAIN) else [])],
        lambda: tokenizer_problems(model, folder, num_rows=num_rows),
    )


def unexamined(model: ModelConfig, *, has_weights: bool = True) -> str | None:
    """Say what of a model was not available to examine; None where everything was, as for every local model.

    Args:
        model: which model.
        has_weights: its weights are read here; False for one that is served elsewhere.
    """
    if model.path is not None:
        return None
    folder = local_folder(model)
    if folder is None or not (folder / CONFIG_FILE).exists():
        return "it is not in the local cache of the hub, so it is checked after its first download"
    if not has_weights:
        return None
    try:
        files = weight_files(folder)
    except WeightFileError:
        return None
    if not files or not all(file.exists() for file in files):
        return "its weights are not in the local cache of the hub, so they are checked after the first download"
    return None


def local_folder(files: PretrainedFiles) -> Path | None:
    """Return the folder of local files, or of what the cache holds of the hub's; None where it holds nothing."""
    if files.path is not None:
        return files.path
    from huggingface_hub import try_to_load_from_cache

    for name in (CONFIG_FILE, "tokenizer.json", "tokenizer_config.json"):
        cached = try_to_load_from_cache(str(files.hub), name, revision=files.revision)
        if isinstance(cached, str):
            return Path(cached).parent
    return None


def _model_problems(
    model: ModelConfig, folder: Path, *, trained: bool, isolated: bool, has_weights: bool
) -> Iterator[Problem]:
    config_file = folder / CONFIG_FILE
    if model.path is None and not config_file.exists():
        return
    try:
        settings = _read_settings(config_file)
    except WeightFileError as error:
        yield _file_problem(model, error)
        return
    problems = list(settings_problems(model, config_file, settings, trained=trained))
    yield from problems
    yield from _other_files(model, folder)
    stored: dict[str, StoredTensor] = {}
    broken = False
    for problem in _read_headers(model, folder, stored) if has_weights else ():
        broken = True
        yield problem
    if problems:
        return  # transformers would say the same again in its own words
    here = model.model_copy(update={"hub": None, "revision": None, "path": folder})
    yield from examine_once(
        ["model", model.model_dump_json(), isolated, sorted(stored), broken],
        [folder],
        lambda: _deep_problems(here, config_file, {} if broken else stored, settings, isolated=isolated),
    )


def _deep_problems(
    model: ModelConfig, file: Path, stored: Mapping[str, StoredTensor], settings: Mapping[str, Any], *, isolated: bool
) -> Iterator[Problem]:
    """Build the model without values, and compare its tensors with the checkpoint's."""
    skeleton, problems = build_skeleton(model, file)
    yield from problems
    if skeleton is None:
        return
    yield from architecture_problems(model, file, skeleton, isolated=isolated)
    method = quantization_method(settings)
    if stored and (method is None or method == "fp8"):  # others pack a weight into tensors of other names
        mismatch = compare_tensors(skeleton, stored)
        yield from tensor_problems(
            mismatch, stored, skeleton, model=model.name, folder=str(file.parent), quantised=method is not None
        )


def _read_settings(file: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        WeightFileError: it is not JSON, or not the file itself.
    """
    refuse_stand_in(file)
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightFileError(file, f"not JSON: {first_line(error)}", "JSON", "Fetch the file again") from error
    if not isinstance(settings, dict):
        raise WeightFileError(file, "not a JSON object", "a configuration of transformers", "Fetch the file again")
    return settings


def _other_files(model: ModelConfig, folder: Path) -> Iterator[Problem]:
    """Examine the files that transformers reads in addition to config.json and weights."""
    if (folder / ADAPTER_FILE).exists():
        yield Problem(
            model.name,
            str(folder / ADAPTER_FILE),
            "the folder also holds an adapter, which transformers applies only where peft is installed",
            "a model without an adapter file",
            "Merge it into the weights (merge_and_unload, save_pretrained), or move it elsewhere",
        )
    generation = folder / "generation_config.json"
    if generation.exists() or generation.is_symlink():
        try:
            _read_settings(generation)
        except WeightFileError as error:
            yield _file_problem(model, error)


def _read_headers(model: ModelConfig, folder: Path, stored: dict[str, StoredTensor]) -> Iterator[Problem]:
    """Read the headers of the weight files into ``stored``; yields what is wrong with the files."""
    try:
        files = weight_files(folder)
    except WeightFileError as error:
        yield _file_problem(model, error)
        return
    if not files and model.path is not None:
        others = sorted(file.name for file in folder.glob("*.safetensors"))
        yield Problem(
            model.name,
            str(folder),
            f"there is neither {SINGLE_FILE} nor an index, only {', '.join(others[:3])}",
            f"{SINGLE_FILE}, or shards with {SINGLE_FILE}.index.json",
            "Fetch the index too, or save the model with save_pretrained",
        )
    absent = [file.name for file in files if not (file.exists() or file.is_symlink())]
    if absent and model.path is None:
        stored.clear()
        return  # of the hub, and not fetched yet
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        yield Problem(
            model.name,
            str(folder),
            f"the index names {absent[0]}{more}, which does not exist",
            f"all {len(files)} files",
            "Fetch them",
        )
    for file in files:
        if file.name in absent:
            continue
        try:
            stored |= read_header(file)
        except WeightFileError as error:
            yield _file_problem(model, error)


def _gguf_problems(model: ModelConfig) -> Iterator[Problem]:
    """Examine a GGUF file: that it is one, and that what reads it is installed."""
    assert model.path is not None
    absent = [package for package in _GGUF_PACKAGES if importlib.util.find_spec(package) is None]
    if absent:
        yield Problem(
            model.name,
            str(model.path),
            f"{' and '.join(absent)} is not installed",
            "the packages that read GGUF files",
            "`pip install ptafuse[demo]`",
        )
        return
    try:
        check_gguf(model.path)
    except WeightFileError as error:
        yield _file_problem(model, error)


def _file_problem(model: ModelConfig, error: WeightFileError) -> Problem:
    return Problem(model.name, str(error.file), error.found, error.expected, error.remedy)
