"""The sandbox: what a hostile or broken program can do is bounded, and how it ended is told truly."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.evaluation.suites.languages import LANGUAGES, LanguageMissingError, check_language, execute
from pipeline.evaluation.suites.sandbox import Execution, Limits, SandboxError, find_interpreter, run_program
from tests.tiny_run import REPOSITORY

PYTHON = find_interpreter("python3")
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the sandbox uses Linux's namespaces and limits"),
    pytest.mark.skipif(PYTHON is None, reason="no python3 that the sandbox's user may run"),
]
MARK = "ptafuse-test-escaped"
"""In the command line of programs that must not survive."""


def run(program: str, **limits: float) -> Execution:
    assert PYTHON is not None
    return run_program([PYTHON, "-I", "-S", "program.py", MARK], {"program.py": program}, Limits(**limits))


@pytest.fixture(scope="module")
def isolated() -> Execution:
    done = run("pass")
    if not done.has_namespaces:
        pytest.skip("this kernel lets no process leave its namespaces")
    return done


def survivors() -> list[str]:
    lines = (path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.is_file())
    return [line.decode() for line in lines if MARK.encode() in line]


def test_program_sees_its_own_files_and_no_environment() -> None:
    done = run("import os, pathlib; print(sorted(os.environ), os.listdir('.')); pathlib.Path('new').write_text('mine')")
    assert done.exit_code == 0
    assert "['program.py']" in done.output
    assert not {"PTAFUSE_DATA", "USER", "VIRTUAL_ENV"} & set(done.output.split("'"))


def test_exit_codes_and_signals_are_reported() -> None:
    assert run("raise SystemExit(3)").exit_code == 3
    assert run("import os; os.kill(os.getpid(), 11)").exit_code == 128 + 11


def test_endless_program_is_ended() -> None:
    done = run("print('begun', flush=True)\nwhile True: pass", seconds=1)
    assert done.exit_code is None
    assert "begun" in done.output
    assert not survivors()


def test_memory_is_bounded() -> None:
    done = run("blocks = [bytearray(2**26) for _ in range(64)]")  # 4 GiB
    assert done.exit_code == 1
    assert "MemoryError" in done.output


def test_files_and_output_are_bounded() -> None:
    done = run("open('large', 'wb').write(bytes(2**21))", file_bytes=2**20)
    assert "File too large" in done.output
    assert len(run("print('x' * 2**21)", file_bytes=2**20).output) <= 2**20


def test_fork_bomb_is_bounded_and_leaves_nothing() -> None:
    bomb = """
import os, time
born = 0
try:
    while True:
        if os.fork() == 0:
            os.setsid()
            time.sleep(60)
        born += 1
except OSError as error:
    print(born, error)
"""
    done = run(bomb)
    assert done.exit_code == 0
    assert int(done.output.split()[0]) <= Limits().processes
    if done.has_namespaces:  # else a process that left its group is out of reach
        assert not survivors()


def test_nothing_is_written_outside_of_its_directory(isolated: Execution, tmp_path: Path) -> None:
    assert isolated.is_read_only
    tmp_path.chmod(0o777)
    target = tmp_path / "outside"
    for place in (target, Path("/tmp") / MARK):
        done = run(f"open({str(place)!r}, 'w').write('x')")
        assert done.exit_code == 1
        assert not place.exists()
    assert run("open('inside', 'w').write('x')").exit_code == 0


def test_there_is_no_network(isolated: Execution) -> None:
    assert isolated.has_namespaces
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = run(f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=2)")
    assert done.exit_code == 1
    assert "unreachable" in done.output


def test_other_processes_cannot_be_signalled(isolated: Execution) -> None:
    done = run(f"import os; os.kill({os.getpid()}, 0)")
    assert "ProcessLookupError" in done.output or "PermissionError" in done.output


def test_program_that_cannot_be_started_is_an_error_of_the_sandbox() -> None:
    with pytest.raises(SandboxError, match="no-such-interpreter"):
        run_program(["/no-such-interpreter"], {}, Limits())


def test_without_the_right_to_namespaces_limits_and_user_still_hold() -> None:
    setpriv = shutil.which("setpriv")
    if setpriv is None or os.geteuid() != 0:
        pytest.skip("only root can give up a right, with setpriv")
    script = (
        "from pipeline.evaluation.suites.sandbox import Limits, find_interpreter, run_program as run\n"
        "python = find_interpreter('python3')\n"
        'text = \'import os, sys; os.getuid() == 0 and sys.exit(9); open("/etc/ptafuse", "w")\'\n'
        "done = run([python, '-I', 'p.py'], {'p.py': text}, Limits())\n"
        "print(done.has_namespaces, done.exit_code, 'Permission denied' in done.output)"
    )
    command = [setpriv, "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", sys.executable, "-c", script]
    shown = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["False", "1", "True"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_language_runs_or_is_refused_with_the_reason(language: str) -> None:
    if find_interpreter(LANGUAGES[language].interpreter) is None:
        with pytest.raises(LanguageMissingError, match="there is no"):
            check_language(language)
        pytest.skip(f"no {LANGUAGES[language].interpreter} here")
    assert check_language(language).exit_code == 0


@pytest.mark.parametrize(
    ("language", "good", "bad", "early"),
    [
        ("py", "assert 1 + 1 == 2", "assert 1 + 1 == 3", "import sys; sys.exit(0)"),
        ("sh", "set -e; [ 2 = 2 ]", "set -e; [ 2 = 3 ]", "exit 0"),
        ("pl", "die unless 1 + 1 == 2;", "die unless 1 + 1 == 3;", "exit 0;"),
        ("js", "require('assert').equal(2, 2);", "require('assert').equal(2, 3);", "process.exit(0);"),
    ],
)
def test_program_passes_when_it_reaches_its_end(language: str, good: str, bad: str, early: str) -> None:
    if find_interpreter(LANGUAGES[language].interpreter) is None:
        pytest.skip(f"no {LANGUAGES[language].interpreter} here")
    assert execute(language, good)[1]
    assert not execute(language, bad)[1]
    assert not execute(language, early)[1]  # it left before its tests were over


def test_compiled_language_is_refused() -> None:
    with pytest.raises(LanguageMissingError, match="rs is not supported"):
        check_language("rs")
