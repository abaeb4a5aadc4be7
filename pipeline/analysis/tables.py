"""Tables that the views of single positions share."""

from collections.abc import Iterable, Sequence

import numpy as np
from rich.columns import Columns
from rich.table import Table
from rich.text import Text

from pipeline.display.text import visible

MAX_TOKENS = 60


MAX_PLAN_COLUMNS = 12


def distribution_table(title: str, entries: Iterable[tuple[str, float]], tail_mass: float | None) -> Table:
    """Build a small table of tokens and probabilities."""
    table = Table(title=title, width=31, title_justify="left", title_style="bold")
    table.add_column("token", no_wrap=True, overflow="ellipsis")
    table.add_column("prob", justify="right")
    for text, probability in entries:
        table.add_row(Text(visible(text)), f"{probability:.4f}")
    if tail_mass is not None:
        table.add_row(Text("(the rest)", style="dim"), f"{tail_mass:.4f}")
    return table


def side_by_side(*tables: Table) -> Columns:
    """Lay out tables side by side, three in 100 columns."""
    return Columns(tables, padding=(0, 1))


def plan_table(title: str, rows: Sequence[str], columns: Sequence[str], values: np.ndarray) -> Table:
    """Build a labelled matrix in percent: source candidates down, target candidates with most mass across."""
    kept = np.sort(np.argsort(-values.sum(axis=0), kind="stable")[:MAX_PLAN_COLUMNS])
    left_out = len(columns) - len(kept)
    more = f"; {left_out} columns with less mass are not shown" if left_out else ""
    table = Table(title=title + more, title_justify="left", title_style="bold", padding=(0, 0), pad_edge=False)
    table.add_column("", no_wrap=True, overflow="ellipsis", max_width=11)
    for column in kept:
        table.add_column(Text(visible(columns[column])), justify="right", no_wrap=True, overflow="ellipsis", width=6)
    for label, row in zip(rows, values, strict=True):
        cells = [f"{100 * row[column]:.1f}" if row[column] >= 5e-4 else "·" for column in kept]
        table.add_row(Text(visible(label)), *cells)
    return table


def token_line(tokens: Sequence[str], position: int) -> Text:
    """Show tokens around a position, with the position's own in reverse video."""
    first = max(0, position - MAX_TOKENS // 2)
    line = Text("… " if first else "")
    for index, token in enumerate(tokens[first : first + MAX_TOKENS], first):
        line.append(visible(token), style="reverse" if index == position else "")
        line.append("|", style="dim")
    return line
