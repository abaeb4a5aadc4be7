"""Table of words and numbers that both the terminal and the page can show."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class ResultTable:
    """A table as people read it.

    Attributes:
        title: content and units of the table.
        columns: their names.
        rows: cells, one per column.
        text_columns: indices of the columns that hold words, not numbers.
        notes: sentences that stand below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: tuple[int, ...] = (0,)
    notes: tuple[str, ...] = ()


def as_rich(data: ResultTable) -> Table:
    """Build a table for the terminal, without its notes (see ``print_table``).

    Brackets in cells are not read as markup.
    """
    table = Table(title=Text(data.title, style="table.title"), title_justify="left")
    for index, name in enumerate(data.columns):
        table.add_column(name, justify="left" if index in data.text_columns else "right")
    for row in data.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def print_table(data: ResultTable, console: Console) -> None:
    """Print a table and its notes; a note is one line, so that a command in it can be copied."""
    console.print(as_rich(data))
    for note in data.notes:
        console.print(note, soft_wrap=True, markup=False, highlight=False)
