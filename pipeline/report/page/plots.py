"""Plots as SVG in the page's text colour, readable in light and dark mode."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

_INK: Final = "#010203"
"""Stands for the page's text colour in what Matplotlib draws; no plot uses it for anything else."""
COLOURS: Final = ("#4a7fc1", "#d9822b", "#3f9b6c", "#a45cb8", "#b5484e", "#7d868f")
"""Read on white and on near-black alike; the page's colours of models in their order."""

_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",  # text stays text: it is found, scaled and read aloud
    "svg.hashsalt": "ptafuse",  # the same figures give the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Bar:
    """Bar of a plot made by ``bars``.

    Attributes:
        label: shown at its left.
        value: length of the bar.
        error: half the length of its error bar, one standard error; None or NaN (of one document) draws none.
        group: bars of a group share a colour.
        signed: whether the number is a difference, which always has a sign.
    """

    label: str
    value: float
    error: float | None = None
    group: int = 0
    signed: bool = True


def bars(entries: Sequence[Bar], *, axis: str) -> str:
    """Plot horizontal bars, the first one on top, each with its number.

    Args:
        entries: at least one.
        axis: measured quantity, and its unit.

    Returns:
        An ``<svg>`` element.
    """
    entries = [replace(entry, error=None) if math.isnan(entry.error or 0.0) else entry for entry in entries]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 0.6 + 0.34 * len(entries)), layout="constrained")
        axes = figure.add_subplot()
        rows = range(len(entries))
        axes.barh(
            rows,
            [entry.value for entry in entries],
            xerr=[entry.error or 0.0 for entry in entries] if any(entry.error for entry in entries) else None,
            color=[COLOURS[entry.group % len(COLOURS)] for entry in entries],
            height=0.7,
            error_kw={"ecolor": _INK, "elinewidth": 1, "capsize": 2},
        )
        axes.set_yticks(rows, [entry.label for entry in entries])
        axes.invert_yaxis()
        _limits(axes, entries)
        for row, entry in enumerate(entries):
            end = max(entry.value + (entry.error or 0.0), 0.0)
            axes.annotate(_number(entry), (end, row), xytext=(4, 0), textcoords="offset points", va="center")
        axes.set_xlabel(axis)
        return _svg(figure)


def _limits(axes: Axes, entries: Sequence[Bar]) -> None:
    low = min(0.0, *(entry.value - (entry.error or 0.0) for entry in entries))
    high = max(0.0, *(entry.value + (entry.error or 0.0) for entry in entries))
    span = (high - low) or 1.0
    axes.set_xlim(low - (0.02 if low == 0 else 0.1) * span, high + 0.18 * span)
    if low < 0:
        axes.axvline(0, color=_INK, linewidth=0.8)


def _number(entry: Bar) -> str:
    if entry.error is None:
        return f"{entry.value:.4g}"
    return f"{entry.value:{'+' if entry.signed else ''}.4f} ± {entry.error:.4f}"


def shares(rows: Mapping[str, Sequence[float]], names: Sequence[str], *, axis: str) -> str:
    """Plot horizontal bars that are divided into parts, the first one on top, with a legend.

    Args:
        rows: label -> its parts, one per name; at least one row.
        names: names of the parts.
        axis: total that the parts are shares of.

    Returns:
        An ``<svg>`` element.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 1.1 + 0.34 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        left = [0.0] * len(rows)
        for index, name in enumerate(names):
            widths = [bar[index] for bar in rows.values()]
            axes.barh(range(len(rows)), widths, left=left, height=0.7, label=name, color=COLOURS[index % len(COLOURS)])
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(rows)), [plain(label) for label in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, max(1.0, *left))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel(axis)
        figure.legend(loc="outside lower left", ncols=4)
        return _svg(figure)


def plain(text: str) -> str:
    """Escape a foreign text for use as a label: Matplotlib reads text between dollar signs as a formula."""
    return text.replace("$", r"\$")


def curves(panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], *, axis: str) -> str:
    """Plot lines side by side with one legend.

    Args:
        panels: title -> (name of a line -> its x and y); a line has the same colour in every panel.
        axis: the x axis of all.

    Returns:
        An ``<svg>`` element.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
        for number, (title, lines) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(1, len(panels), number)
            for name, (x, y) in lines.items():
                colour = COLOURS[names.index(name) % len(COLOURS)]
                axes.plot(x, y, label=name, color=colour, linewidth=1.5, marker="." if len(x) < 60 else None)
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel(axis)
        handles = {
            label: handle
            for axes in figure.axes
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=3)
        return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = buffer.getvalue()
    return drawn[drawn.index("<svg") :].replace(_INK, "currentColor")
