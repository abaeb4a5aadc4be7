"""Checkpoints of a training run, and the final model.

    <output>/checkpoint-000500/model.safetensors      float32 weights, each shared tensor once
                               optimizer.safetensors  AdamW's state, "<parameter>/<name>"
                               state.json             where the run stands
                               COMMITTED              written last: without it the folder is worth nothing
    <output>/model/                                   the finished model, for from_pretrained
    <output>/manifest.json                            written last: the proof that the job is done

Tensors are safetensors throughout: nothing here is a pickle.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stages.contract.store import sync

COMMITTED = "COMMITTED"
_FOLDER = re.compile(r"^checkpoint-(\d{6,})$")


@dataclass(frozen=True)
class TrainState:
    """Where a run stands after an optimizer step.

    Attributes:
        fingerprint: of the job.
        dataset: sha256 over the fused files' hashes.
        seed: of the blocks' order.
        num_blocks: in the dataset.
        step: optimizer steps done.
        epoch: of the next block.
        next_sample: blocks trained on so far, all epochs together: index of the next one in the global order.
        num_tokens: tokens trained on so far.
    """

    fingerprint: str
    dataset: str
    seed: int
    num_blocks: int
    step: int
    epoch: int
    next_sample: int
    num_tokens: int


def checkpoint_folder(output: Path, step: int) -> Path:
    """``<output>/checkpoint-000500``."""
    return output / f"checkpoint-{step:06d}"


def committed_steps(output: Path) -> list[int]:
    """Steps of the committed checkpoints, ascending."""
    found = ((_FOLDER.match(folder.name), folder) for folder in output.glob("checkpoint-*"))
    return sorted(int(match[1]) for match, folder in found if match and (folder / COMMITTED).exists())


def save_checkpoint(
    output: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState, *, keep: int
) -> Path:
    """Write a checkpoint, commit it, then remove all but the ``keep`` newest.

    Returns:
        Its folder.
    """
    final = checkpoint_folder(output, state.step)
    folder = output / f".{final.name}.{uuid.uuid4().hex[:8]}.tmp"  # its own, should two processes train the same job
    folder.mkdir(parents=True)
    save_file(_named_tensors(model), folder / "model.safetensors")
    save_file(_optimizer_tensors(model, optimizer), folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(asdict(state), indent=1) + "\n")
    for path in folder.iterdir():
        sync(path)
    sync(folder)
    (folder / COMMITTED).write_text(f"{state.fingerprint}\n")
    sync(folder / COMMITTED)
    sync(folder)
    if final.exists():
        shutil.rmtree(final)  # the same step of the same job
    folder.rename(final)
    sync(output)
    remove_old_checkpoints(output, keep=keep)
    return final


def remove_old_checkpoints(output: Path, *, keep: int) -> None:
    """Remove all but the ``keep`` newest committed checkpoints, and what interrupted attempts left before them."""
    newest = committed_steps(output)[-keep:]
    for folder in output.glob("checkpoint-*"):
        match = _FOLDER.match(folder.name)
        if match and newest and int(match[1]) < newest[0]:
            (folder / COMMITTED).unlink(missing_ok=True)  # first, so that half a removal is not taken for a checkpoint
            shutil.rmtree(folder)


def load_newest_checkpoint(
    output: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, expected: TrainState
) -> TrainState:
    """Restore the newest committed checkpoint, if there is one.

    Args:
        output: the run's folder.
        model: its weights are overwritten.
        optimizer: its state is overwritten.
        expected: the job's state before its first step; fingerprint, dataset, seed and number of blocks must agree.

    Returns:
        The checkpoint's state; ``expected`` when there is no committed checkpoint.

    Raises:
        ValueError: the checkpoint belongs to another job, or its tensors do not fit the model.
    """
    for left_over in output.glob(".checkpoint-*.tmp"):  # a killed process was writing it
        shutil.rmtree(left_over)
    steps = committed_steps(output)
    if not steps:
        return expected
    folder = checkpoint_folder(output, steps[-1])
    state = TrainState(**json.loads((folder / "state.json").read_text()))
    for name in ("fingerprint", "dataset", "seed", "num_blocks"):
        found, wanted = getattr(state, name), getattr(expected, name)
        if found != wanted:
            raise ValueError(
                f"{folder} belongs to another job: its {name} is {found!r}, this job's is {wanted!r}. Train into another "
                f"output folder, or remove {output}"
            )
    _copy_into(_named_tensors(model), load_file(folder / "model.safetensors"), folder)
    _load_optimizer(model, optimizer, load_file(folder / "optimizer.safetensors"), folder)
    return state


def _named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name; a tied parameter once, under its first name."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    persistent = model.state_dict(keep_vars=False).keys()
    tensors |= {name: buffer.detach() for name, buffer in model.named_buffers() if name in persistent}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value.detach().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _copy_into(tensors: dict[str, torch.Tensor], saved: dict[str, torch.Tensor], folder: Path) -> None:
    if tensors.keys() != saved.keys():
        differing = sorted(tensors.keys() ^ saved.keys())
        raise ValueError(f"{folder} does not fit the model: {len(differing)} tensors differ, first {differing[0]}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.shape != saved[name].shape:
                raise ValueError(
                    f"{folder}: {name} has shape {tuple(saved[name].shape)}, expected {tuple(tensor.shape)}"
                )
            tensor.copy_(saved[name])


def _load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, torch.Tensor], folder: Path
) -> None:
    parameters = dict(model.named_parameters())
    for key, value in saved.items():
        name, _, field = key.rpartition("/")
        if name not in parameters:
            raise ValueError(
                f"{folder} does not fit the model: it has optimizer state of {name}, which the model lacks"
            )
        parameter = parameters[name]
        # AdamW keeps its step counter on the CPU; the moments live with the parameter.
        optimizer.state[parameter][field] = value if field == "step" else value.to(parameter.device)


def export_model(folder: Path, model: Any, tokenizer: Any, card: str) -> dict[str, str]:
    """Save the finished model for ``from_pretrained``; the folder appears whole, over an older one.

    Returns:
        File name -> sha256.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    if temporary.exists():
        shutil.rmtree(temporary)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(card)
    for path in temporary.rglob("*"):
        sync(path)
    if folder.exists():
        shutil.rmtree(folder)  # no manifest names it: an attempt that was interrupted before its manifest
    temporary.replace(folder)
    sync(folder.parent)
    return {str(path.relative_to(folder)): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def write_manifest(output: Path, manifest: dict[str, Any]) -> None:
    """Publish ``manifest.json`` whole: the proof that the job is done."""
    temporary = output / f".manifest.{os.getpid()}.json"
    temporary.write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n")
    sync(temporary)
    temporary.replace(output / "manifest.json")
    sync(output)


def read_manifest(output: Path) -> dict[str, Any] | None:
    """The manifest of a finished job; None when it is not finished."""
    try:
        return json.loads((output / "manifest.json").read_text())
    except FileNotFoundError:
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
