"""One measured figure."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A line of ``make bench``.

    Attributes:
        name: e.g. ``"pipeline.overhead_per_shard_ms"``.
        value: what was measured.
        unit: of the value.
        goal: what it should be, in words that a program can compare: ``"<= 50"``.
        command: what measures it again; the program fills it in.
    """

    name: str
    value: float
    unit: str
    goal: str
    command: str = ""

    def to_json(self) -> dict[str, Any]:
        """As printed; the value with four significant digits."""
        return {**asdict(self), "value": float(f"{self.value:.4g}")}
