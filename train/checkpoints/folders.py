"""Folders of checkpoints in a run's output: their names, and which of them are complete."""

import logging
import re
import shutil
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

COMMITTED: Final = "COMMITTED"
"""Name of the file that is written last: a folder without it is not a checkpoint."""
LOG: Final = "log.jsonl"
"""Name of the log of steps next to the folders."""
_FOLDER: Final = re.compile(r"^checkpoint-(\d{6,})$")


def checkpoint_folder(output: Path, step: int) -> Path:
    """Return ``<output>/checkpoint-000500``."""
    return output / f"checkpoint-{step:06d}"


def committed_steps(output: Path) -> list[int]:
    """Return the steps of the committed checkpoints, ascending."""
    return sorted(step for step, folder in _folders(output) if (folder / COMMITTED).exists())


def checkpoint_step(name: str) -> int | None:
    """Return the step in the name of a checkpoint folder, None for any other name."""
    match = _FOLDER.match(name)
    return int(match[1]) if match else None


def _folders(output: Path) -> list[tuple[int, Path]]:
    numbered = ((checkpoint_step(folder.name), folder) for folder in output.glob("checkpoint-*"))
    return [(step, folder) for step, folder in numbered if step is not None]


def remove_torn_checkpoints(output: Path) -> None:
    """Remove checkpoints without COMMITTED: no process is writing one when a job starts."""
    for step, folder in _folders(output):
        if not (folder / COMMITTED).exists():
            logger.info("checkpoint of step %d was not completed: removed", step)
            shutil.rmtree(folder)


def remove_old_checkpoints(output: Path, *, keep: int) -> None:
    """Remove all but the ``keep`` newest committed checkpoints."""
    for step in committed_steps(output)[:-keep]:
        folder = checkpoint_folder(output, step)
        (folder / COMMITTED).unlink()  # first, so that a half-removed folder is not mistaken for a checkpoint
        shutil.rmtree(folder)


def remove_checkpoints(output: Path, *, but: int | None = None) -> None:
    """Remove what this machine has of all checkpoints, or of all but that of one step."""
    for step, folder in _folders(output):
        if step != but:
            shutil.rmtree(folder)
