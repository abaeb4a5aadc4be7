"""Ways of spoiling a model's folder, and what the preflight then says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from stages.models.config import ModelConfig
from stages.models.preflight.examine import examine
from stages.models.preflight.problem import Problem

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 4968\n"


def problems(folder: Path, *, trained: bool = False, isolated: bool = False, **settings: Any) -> list[Problem]:
    """Examine a folder as the model ``m``."""
    return examine(ModelConfig(name="m", path=folder, **settings), trained=trained, isolated=isolated)


def messages(folder: Path, **arguments: Any) -> list[str]:
    return [str(problem) for problem in problems(folder, **arguments)]


def edit_json(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; a key that becomes None goes."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def change_weights(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Change the tensors of ``model.safetensors``."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file, metadata={"format": "pt"})
