"""Run a program that a model wrote where it can do little harm; docs/evaluation.md says what is not isolated."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.evaluation.suites import confine

OUTPUT_TAIL_BYTES = 65_536
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"


class SandboxError(RuntimeError):
    """Error of the sandbox itself, which says nothing about the program."""


@dataclass(frozen=True)
class Limits:
    """Resource limits of a program.

    Attributes:
        seconds: wall-clock time, after which it is killed with all its children. Each process has one more second of CPU time.
        memory_bytes: address space of each process; None for runtimes that reserve far more than they use.
        processes: largest number of processes at once, threads included.
        file_bytes: size of each file that it writes, its output among them.
        open_files: largest number of open files at once.
    """

    seconds: float = 10.0
    memory_bytes: int | None = 512 * 2**20
    processes: int = 8
    file_bytes: int = 16 * 2**20
    open_files: int = 64


@dataclass(frozen=True)
class Execution:
    """Outcome of a program.

    Attributes:
        exit_code: 128 + the signal's number where a signal ended it; None where the time was up.
        output: end of its standard output and error.
        has_namespaces: whether it had no network, and its own processes, IPC and mounts.
        is_read_only: whether it could write only to its own directory.
    """

    exit_code: int | None
    output: str
    has_namespaces: bool
    is_read_only: bool


def find_interpreter(name: str) -> str | None:
    """Find an interpreter's path; None if it is not installed.

    A process of root runs the programs as `nobody`, who can use only what is installed for all users.
    """
    path = SYSTEM_PATH
    if os.geteuid() != 0:
        path += os.pathsep + str(Path(sys.executable).resolve().parent)
    return shutil.which(name, path=path)


def run_program(command: Sequence[str], files: Mapping[str, str], limits: Limits) -> Execution:
    """Run a program in a separate directory, which is removed afterwards.

    Args:
        command: an interpreter's full path, and its arguments.
        files: name -> text of the files in the directory.
        limits: resource limits of the program.

    Raises:
        SandboxError: the program could not be started.
    """
    with tempfile.TemporaryDirectory(prefix="ptafuse-", ignore_cleanup_errors=True) as directory:
        for name, text in files.items():
            path = Path(directory, name)
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
            path.chmod(0o644)
        return _run(command, directory, limits)


def _run(command: Sequence[str], directory: str, limits: Limits) -> Execution:
    receiver, sender = os.pipe()
    settings = json.dumps({**asdict(limits), "directory": directory, "status_fd": sender})
    with tempfile.TemporaryFile() as output, os.fdopen(receiver, "rb") as statuses:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", confine.__file__, settings, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=directory,
                env={},
                pass_fds=(sender,),
                start_new_session=True,
            )
        finally:
            os.close(sender)
        try:
            exit_code: int | None = process.wait(timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            exit_code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also processes that it left behind
            process.wait()
        told = _Told.of(statuses.read())
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - OUTPUT_TAIL_BYTES))
        text = output.read().decode("utf-8", errors="replace")
    if told.error is not None or not told.has_started:
        raise SandboxError(f"a program could not be started in the sandbox: {told.error or text.strip() or exit_code}")
    return Execution(exit_code, text, told.has_namespaces, told.is_read_only)


@dataclass(frozen=True)
class _Told:
    """Report of ``confine``."""

    error: str | None = None
    has_started: bool = False
    has_namespaces: bool = False
    is_read_only: bool = False

    @classmethod
    def of(cls, raw: bytes) -> "_Told":
        lines = [json.loads(line) for line in raw.splitlines()]
        merged = {key: value for line in lines for key, value in line.items()}
        return cls(
            error=merged.get("error"),
            has_started="namespaces" in merged,
            has_namespaces=bool(merged.get("namespaces")),
            is_read_only=bool(merged.get("read_only")),
        )
