"""Run one program where it can do little harm (limits, no network, a read-only file system), and exit as it did.

Executed as a script by ``sandbox.py``, with only the standard library: ``python -I -S confine.py SETTINGS COMMAND...``.
SETTINGS is JSON: ``directory``, ``status_fd``, and the fields of ``sandbox.Limits``. What could be isolated,
or why the program could not be started, is written to ``status_fd`` as JSON, one line each.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import Any

NOBODY = 65534
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x00020000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CANNOT_START = 126

_libc = ctypes.CDLL(None, use_errno=True)


def confine(settings: dict[str, Any], command: list[str]) -> int:
    """Run a program and return its exit code; 128 + the signal's number where a signal ended it."""
    os.set_inheritable(settings["status_fd"], False)
    directory = settings["directory"]
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(directory, NOBODY, NOBODY)
    has_namespaces = _enter_namespaces(is_root=is_root)
    read_only = has_namespaces and _make_read_only(directory)
    os.chdir(directory)  # again: the directory has been mounted over since
    _tell(settings, {"namespaces": has_namespaces, "read_only": read_only, "user": NOBODY if is_root else os.geteuid()})
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    first = os.fork()  # the first process of the new PID namespace: when it ends, the kernel kills all others there
    if first == 0:
        os._exit(_as_first_process(settings, command, is_root=is_root))
    return _exit_code(os.waitpid(first, 0)[1])


def _as_first_process(settings: dict[str, Any], command: list[str], *, is_root: bool) -> int:
    if is_root:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # after setuid, which takes it back
    program = os.fork()
    if program == 0:
        _start(settings, command)
    return _exit_code(os.waitpid(program, 0)[1])


def _start(settings: dict[str, Any], command: list[str]) -> None:
    """Become the program; never returns."""
    try:
        _set_limits(settings)
        environment = {"HOME": settings["directory"], "TMPDIR": settings["directory"], "LANG": "C.UTF-8"}
        os.execve(command[0], command, {**environment, "PATH": "/usr/local/bin:/usr/bin:/bin"})
    except (OSError, ValueError) as error:
        _tell(settings, {"error": f"{command[0]}: {error}"})
    finally:
        os._exit(CANNOT_START)


def _set_limits(settings: dict[str, Any]) -> None:
    cpu = int(settings["seconds"]) + 1
    limits = {
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_FSIZE: settings["file_bytes"],
        resource.RLIMIT_NOFILE: settings["open_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: _num_threads(os.geteuid()) + settings["processes"],
    }
    if settings["memory_bytes"] is not None:
        limits[resource.RLIMIT_AS] = settings["memory_bytes"]
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


def _num_threads(user: int) -> int:
    """Count the threads that a user has already, since the kernel's limit includes them."""
    count = 0
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)
        except OSError:
            continue  # it ended
        if int(lines["Uid"].split()[0]) == user:
            count += int(lines["Threads"])
    return count


def _enter_namespaces(*, is_root: bool) -> bool:
    """Leave network, mounts, processes and IPC of the machine; False where the kernel does not let us."""
    spaces = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    user, group = os.geteuid(), os.getegid()
    if _libc.unshare(spaces if is_root else spaces | CLONE_NEWUSER):
        return False
    if not is_root:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return True


def _make_read_only(directory: str) -> bool:
    """Make every mount read-only except the program's directory.

    Returns False if the kernel is too old (before 5.12) or refuses.
    """
    place = directory.encode()
    if _libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) or _libc.mount(place, place, None, MS_BIND, None):
        return False
    read_only = struct.pack("4Q", MOUNT_ATTR_RDONLY, 0, 0, 0)
    writable = struct.pack("4Q", 0, MOUNT_ATTR_RDONLY, 0, 0)
    if _libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, read_only, len(read_only)):
        return False
    return not _libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, place, 0, writable, len(writable))


def _tell(settings: dict[str, Any], status: dict[str, Any]) -> None:
    os.write(settings["status_fd"], json.dumps(status).encode() + b"\n")


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(confine(json.loads(sys.argv[1]), sys.argv[2:]))
