"""Benchmarks over time: draw ``docs/benchmarks/history.jsonl`` as ``history.svg`` in the same folder.

A change that moves a figure adds one line per figure; ``python -m tests.benchmarks.history`` draws them again. A line has

- ``figure``: as ``make bench`` names it, with the case in brackets;
- ``date``, ``commit``: when, and which code was measured;
- ``value``, ``unit``, ``better`` ("higher" or "lower");
- ``change``: what changed since the line before, and what else differed (a slow moment, another machine).
"""

import hashlib
import json
from pathlib import Path
from typing import Final, Literal

import matplotlib as mpl
from matplotlib.figure import Figure as Plot
from pydantic import BaseModel, ConfigDict, Field

HISTORY: Final = Path(__file__).parents[2] / "docs" / "benchmarks" / "history.jsonl"
DRAWN: Final = HISTORY.with_suffix(".svg")
COLUMNS: Final = 2


class Measurement(BaseModel):
    """One line of the history."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    figure: str
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    commit: str = Field(pattern=r"^[0-9a-f]{7,40}$")
    value: float = Field(gt=0, allow_inf_nan=False)
    unit: str
    better: Literal["higher", "lower"]
    change: str = Field(min_length=1)


def read_history(path: Path = HISTORY) -> dict[str, list[Measurement]]:
    """Return figure -> its measurements, in the order of the file.

    Raises:
        ValueError: a line is not a measurement; says which.
    """
    found: dict[str, list[Measurement]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            measurement = Measurement.model_validate(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        found.setdefault(measurement.figure, []).append(measurement)
    return found


def digest(path: Path = HISTORY) -> str:
    """Return the hash of the history that the drawing carries as its version."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def draw(history: dict[str, list[Measurement]], out: Path, version: str) -> None:
    """Draw one panel per figure: its values in the order in which they were measured.

    Args:
        history: from ``read_history``.
        out: the SVG.
        version: from ``digest``; stands in the SVG's metadata.
    """
    mpl.rcParams.update({"svg.hashsalt": "ptafuse", "svg.fonttype": "none"})  # text as text: a tenth of the bytes
    rows = -(-len(history) // COLUMNS)
    plot = Plot(figsize=(10, 1.9 * rows), layout="constrained")
    panels = plot.subplots(rows, COLUMNS, squeeze=False).ravel()
    for panel, (name, measurements) in zip(panels, history.items(), strict=False):
        values = [measurement.value for measurement in measurements]
        panel.plot(range(len(values)), values, marker="o", color="#35627a")
        for index, value in enumerate(values):
            panel.annotate(
                f"{value:,.6g}", (index, value), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=7
            )
        panel.set_title(f"{name} [{measurements[0].unit}], {measurements[0].better} is better", fontsize=8, loc="left")
        panel.set_xticks(range(len(values)), [f"{one.date[5:]}\n{one.commit}" for one in measurements], fontsize=6)
        panel.set_ylim(0, max(values) * 1.3)
        panel.set_xlim(-0.5, len(values) - 0.5)
        panel.tick_params(axis="y", labelsize=6)
    for panel in panels[len(history) :]:
        panel.set_axis_off()
    plot.savefig(out, format="svg", metadata={"Date": None, "Title": f"history {version}"})
    out.write_text(
        "\n".join(line.rstrip() for line in out.read_text(encoding="utf-8").splitlines()) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    draw(read_history(), DRAWN, digest())
    print(DRAWN)
