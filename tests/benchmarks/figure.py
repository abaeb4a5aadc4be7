"""One measured figure."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A line of ``make bench``.

    Attributes:
        name: e.g. ``"pipeline.overhead_per_shard_ms"``.
        value: measured value.
        unit: unit of the value.
        goal: condition on the value that a program can check, such as ``"<= 50"``.
        command: command that repeats the measurement; ``tests.benchmarks`` fills it in.
    """

    name: str
    value: float
    unit: str
    goal: str
    command: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the printed JSON object, with the value rounded to four significant digits."""
        return {**asdict(self), "value": float(f"{self.value:.4g}")}
