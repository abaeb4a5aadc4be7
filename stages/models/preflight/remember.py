"""Remember which files were found sound, so that a command on a finished run does not examine them again."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from stages.models.config import TOKENIZER_FILES, WEIGHT_FILES
from stages.models.preflight.problem import Problem

_FILES: Final = (*TOKENIZER_FILES, *WEIGHT_FILES, "*.py", "*.json", "*.jinja")
_MAX_REMEMBERED: Final = 500


def examine_once(
    key: Sequence[Any], places: Sequence[Path], examination: Callable[[], Iterable[Problem]]
) -> list[Problem]:
    """Examine files unless they were found sound before.

    Files are known by path, size and time of change. Other libraries, or another version of this package, examine again;
    what was found wrong is not remembered.

    Args:
        key: inputs of the examination other than the files, as JSON values.
        places: the files, or the folders that they are in.
        examination: yields what is wrong.
    """
    digest = _digest(key, places)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptafuse" / "preflight.json"
    try:
        sound: list[str] = json.loads(cache.read_text())
    except (OSError, ValueError):
        sound = []
    if digest in sound:
        return []
    problems = list(examination())
    if not problems:
        _write(cache, [*sound, digest][-_MAX_REMEMBERED:])
    return problems


def _digest(key: Sequence[Any], places: Sequence[Path]) -> str:
    in_folders = {
        file for place in places if place.is_dir() for name in _FILES for file in place.glob(name) if file.exists()
    }
    files = sorted(in_folders | {place for place in places if place.is_file()})
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    versions = [metadata.version(name) for name in ("transformers", "tokenizers", "torch")]
    code = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))))
    return hashlib.sha256(json.dumps([list(key), stamps, versions, code.hexdigest()]).encode()).hexdigest()


def _write(cache: Path, sound: list[str]) -> None:
    """Write the cache; a read-only home only costs the examination next time."""
    temporary = cache.with_suffix(f".{os.getpid()}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(sound))
        temporary.replace(cache)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
