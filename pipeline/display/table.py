"""A table of words and numbers, shown by the terminal and by the page alike."""

from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class ResultTable:
    """A table as people read it.

    Attributes:
        title: what it says, in which units.
        columns: their names.
        rows: cells, one a column.
        text_columns: indices of the columns that hold words, not numbers.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: tuple[int, ...] = (0,)


def as_rich(data: ResultTable) -> Table:
    """A table for the terminal."""
    table = Table(title=data.title, title_justify="left")
    for index, name in enumerate(data.columns):
        table.add_column(name, justify="left" if index in data.text_columns else "right")
    for row in data.rows:
        table.add_row(*row)
    return table
