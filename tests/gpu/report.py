"""The lines that ``make gpu-check`` prints, and the limits that they are held against."""

import gc
import json
import math
import operator
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from signal import ITIMER_REAL, SIGALRM, setitimer, signal
from typing import Any, Final, TextIO

from tests.gpu.sizes import Size

_COMPARISONS: Final[Mapping[str, Callable[[float, float], bool]]] = {"<=": operator.le, ">=": operator.ge}
_OURS: Final = ("pipeline", "stages", "tests", "train")

Value = float | str | None


class UnavailableError(Exception):
    """A section, or a part of it, cannot run on this machine; the message says what it lacks."""


class TimeCapError(Exception):
    """A section took longer than it may."""


@dataclass(frozen=True)
class Section:
    """One part of the check.

    Attributes:
        name: as printed and as chosen with ``--only``.
        module: its function ``run_<name>(report, setup)`` is the section. Imported when the section runs, so that a package
            that is missing stops the sections that need it and no other.
        cap_seconds: what it may take.
    """

    name: str
    module: str
    cap_seconds: float

    def run(self, report: "Report", setup: "Setup") -> None:
        """Import the section's module and run it."""
        getattr(import_module(self.module), f"run_{self.name}")(report, setup)


@dataclass
class Setup:
    """What all sections are given.

    Attributes:
        size: of models and data.
        device: ``"cuda"`` or ``"cpu"``.
        scratch: an empty folder.
        measured: figures that later sections are held against, by name.
    """

    size: Size
    device: str
    scratch: Path
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def is_fast(self) -> bool:
        """Speed and memory are held against their limits: full size, on a GPU."""
        return self.size.is_full and self.device == "cuda"


class Report:
    """Prints lines and remembers whether one of them failed."""

    def __init__(self, stream: TextIO, *, with_speed: bool, strict: bool = False) -> None:
        """Begin without lines.

        Args:
            stream: gets one JSON object per line, as soon as it is known.
            with_speed: hold figures of speed and memory against their limits; otherwise they are printed without one.
            strict: what cannot run counts as failed.
        """
        self._stream = stream
        self._with_speed = with_speed
        self._strict = strict
        self.section = ""
        self.failed = False

    def add(self, figure: str, value: Value, limit: str | None = None) -> None:
        """Print a figure whose limit holds on every machine.

        Args:
            figure: its name, with its unit.
            value: what was found.
            limit: ``"<= 1e-4"``, ``">= 0.9"`` or ``"0.85 to 1.15"``; None: the figure is for reading only.
        """
        self._print(figure, value, limit, None if limit is None else _keeps(value, limit))

    def add_speed(self, figure: str, value: Value, limit: str | None = None) -> None:
        """Print a figure of speed or memory: its limit holds at full size on a GPU only."""
        self.add(figure, value, limit if self._with_speed else None)

    def unavailable(self, figure: str, reason: str) -> None:
        """Print that something could not run here."""
        self._print(figure, f"not run: {reason}", None, False if self._strict else None)

    def error(self, message: str) -> None:
        """Print that the section failed."""
        self._print("error", message, None, False)

    def _print(self, figure: str, value: Value, limit: str | None, ok: bool | None) -> None:
        if ok is False:
            self.failed = True
        if isinstance(value, float):
            value = float(f"{value:.5g}") if math.isfinite(value) else str(value)
        line = {"section": self.section, "figure": figure, "value": value, "limit": limit, "ok": ok}
        self._stream.write(json.dumps(line, allow_nan=False) + "\n")
        self._stream.flush()


def _keeps(value: Value, limit: str) -> bool:
    """Return whether a value keeps its limit; NaN and values that are not numbers do not."""
    if not isinstance(value, int | float):
        return False
    if " to " in limit:
        least, most = map(float, limit.split(" to "))
        return least <= value <= most
    comparison, bound = limit.split()
    return _COMPARISONS[comparison](value, float(bound))


def run_sections(sections: tuple[Section, ...], report: Report, setup: Setup, *, total_seconds: float) -> None:
    """Run sections one after the other; one that fails does not stop the next.

    Args:
        sections: in order.
        report: gets their lines.
        setup: of the sections.
        total_seconds: what all of them may take together; those that are left then are reported as failed.
    """
    end = time.monotonic() + total_seconds
    for section in sections:
        report.section = section.name
        started = time.monotonic()
        cap = min(section.cap_seconds, end - started)
        if cap <= 0:
            report.error(f"not begun: the {total_seconds:g} s of the whole check are used up")
            continue
        try:
            with _time_cap(cap):
                section.run(report, setup)
        except UnavailableError as reason:
            report.unavailable("section", str(reason))
        except ModuleNotFoundError as error:
            if (error.name or "").split(".", maxsplit=1)[0] in _OURS:
                report.error(_described(error))
            else:
                report.unavailable("section", f"the package {error.name} is not installed")
        except Exception as error:  # noqa: BLE001 - whatever it is, the other sections still say what they find
            report.error(_described(error))
        report.add("seconds", time.monotonic() - started)
        free_memory(setup.device)


def _described(error: Exception) -> str:
    """Write an error's traceback to standard error; return its type and first line, and where it was raised."""
    traceback.print_exception(error, file=sys.stderr)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    first_line = str(error).strip().split("\n", 1)[0]
    return f"{type(error).__name__}: {first_line} ({Path(frame.filename).name}:{frame.lineno})"


@contextmanager
def _time_cap(seconds: float) -> Iterator[None]:
    """Raise ``TimeCapError`` in the main thread after so many seconds.

    A call that hangs inside a library is interrupted when it returns to Python; ``smoke.main`` ends the process where it
    does not.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("sections run in the main thread: signals, which cap their time, are delivered there")

    def stop(*_: Any) -> None:
        raise TimeCapError(f"stopped after {seconds:.0f} s, the section's share of the time")

    before = signal(SIGALRM, stop)
    setitimer(ITIMER_REAL, seconds)
    try:
        yield
    finally:
        setitimer(ITIMER_REAL, 0)
        signal(SIGALRM, before)


def free_memory(device: str) -> None:
    """Give back what the models of a finished section held."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
