"""Programming languages whose programs the sandbox can run: those with an interpreter on this machine."""

from dataclasses import dataclass
from typing import Final

from pipeline.evaluation.suites.sandbox import Execution, Limits, SandboxError, find_interpreter, run_program

DEFAULT_LIMITS: Final = Limits()


@dataclass(frozen=True)
class Language:
    """Command and limits for running programs of one language.

    Attributes:
        name: name in MultiPL-E.
        interpreter: a program's name; its arguments follow in ``arguments``.
        file: name of the program's file.
        arguments: before the file's name.
        ending: a statement that prints ``{}``: it is reached where all tests before it passed.
        limits: resource limits of a program.
    """

    name: str
    interpreter: str
    file: str
    ending: str
    arguments: tuple[str, ...] = ()
    limits: Limits = DEFAULT_LIMITS


LANGUAGES: Final = {
    language.name: language
    for language in (
        Language("py", "python3", "program.py", 'print("{}")', ("-I", "-S", "-B")),
        Language("sh", "bash", "program.sh", 'echo "{}"', limits=Limits(processes=16)),
        Language("pl", "perl", "program.pl", 'print "{}\\n";'),
        Language("lua", "lua", "program.lua", 'print("{}")'),
        Language("rb", "ruby", "program.rb", 'puts "{}"', limits=Limits(memory_bytes=2**30)),
        Language("php", "php", "program.php", 'echo "{}\\n";', limits=Limits(memory_bytes=2**30)),
        Language("r", "Rscript", "program.R", 'cat("{}\\n")', limits=Limits(memory_bytes=2**30)),
        # V8 reserves an address space of many gigabytes, and starts a thread a core.
        Language(
            "js",
            "node",
            "program.js",
            'console.log("{}");',
            ("--max-old-space-size=512", "--v8-pool-size=1"),
            Limits(memory_bytes=None, processes=32),
        ),
    )
}
"""The compiled languages of MultiPL-E (cpp, cs, d, go, java, jl, rkt, rs, scala, swift, ts) are not run here."""

_DONE: Final = "every test passed: 6f2b1c"
"""Printed at a program's end: a program that leaves early, even with exit code 0, has not passed its tests."""


class LanguageMissingError(RuntimeError):
    """Programs of a language cannot be run here; says why."""


def check_language(name: str) -> Execution:
    """Run an empty program, so that a runtime that cannot start is not taken for a model that cannot program.

    Raises:
        LanguageMissingError: no interpreter, or it does not run in the sandbox.
    """
    language = LANGUAGES.get(name)
    if language is None:
        raise LanguageMissingError(f"{name} is not supported (only interpreted languages: {', '.join(LANGUAGES)})")
    if find_interpreter(language.interpreter) is None:
        raise LanguageMissingError(f"{name}: there is no {language.interpreter} on this machine")
    empty = "<?php\n" if name == "php" else ""
    try:
        done, passed = execute(name, empty)
    except SandboxError as error:
        raise LanguageMissingError(f"{name}: {error}") from None
    if not passed:
        end = "it did not finish in time" if done.exit_code is None else f"exit code {done.exit_code}"
        raise LanguageMissingError(
            f"{name}: {language.interpreter} does not run in the sandbox ({end}): {done.output[-300:].strip()}"
        )
    return done


def execute(name: str, program: str) -> tuple[Execution, bool]:
    """Run a program that ends with its tests.

    Args:
        name: name of the language.
        program: source text of the program.

    Returns:
        How it ended, and whether it came to its end without a failed test.

    Raises:
        SandboxError: the sandbox failed.
    """
    language = LANGUAGES[name]
    interpreter = find_interpreter(language.interpreter)
    if interpreter is None:
        raise SandboxError(f"there is no {language.interpreter} on this machine")
    text = f"{program}\n{language.ending.format(_DONE)}\n"
    done = run_program([interpreter, *language.arguments, language.file], {language.file: text}, language.limits)
    return done, done.exit_code == 0 and done.output.rstrip().endswith(_DONE)
