"""sha256 of bytes and of files, in hexadecimal."""

import hashlib
import json
import os
from pathlib import Path


def sha256(raw: bytes) -> str:
    """Return the sha256 of some bytes."""
    return hashlib.sha256(raw).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a local file.

    Raises:
        FileNotFoundError: the file does not exist.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_file_sha256(path: Path) -> str:
    """Return the sha256 of a local file; remembered by path, size and time of change, since weights are large."""
    stat = path.stat()
    key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    cache_file = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptafuse" / "sha256.json"
    try:
        cache = json.loads(cache_file.read_text())
    except (OSError, ValueError):
        cache = {}
    if key not in cache:
        cache[key] = file_sha256(path)
        if stat.st_size >= 2**20:  # small files are hashed faster than a cache is written
            _remember(cache_file, cache)
    return cache[key]


def _remember(cache_file: Path, cache: dict[str, str]) -> None:
    """Write the cache; a read-only home only costs the hash next time."""
    temporary = cache_file.with_suffix(f".{os.getpid()}")
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(cache))
        temporary.replace(cache_file)
    except OSError:
        temporary.unlink(missing_ok=True)
