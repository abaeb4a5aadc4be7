"""``ptafuse inspect``: rows of a shard as text."""

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.display.text import visible
from pipeline.run.session import StageError
from pipeline.run.steps import ResolvedRun, Step
from stages.contract.manifest import Manifest
from stages.contract.store import Store

MAX_ROWS = 20
MAX_TOKENS = 60
MAX_PLAN_COLUMNS = 12


def show(
    run: ResolvedRun, store: Store, stage: str, shard: int, row: int | None, position: int | None, console: Console
) -> None:
    """Print a shard, one of its rows, or one position of a row.

    Args:
        run: the configuration whose results are shown.
        store: the run directory.
        stage: a step's key, ``"align/gemma3"``; a stage that has one step only may be given without its model.
        shard: the shard.
        row: row of the shard (a segment; for ``fuse`` a block), None for an overview.
        position: position in the row, None for all of them in short.
        console: where to.

    Raises:
        StageError: there is no such step, shard, row or position; says which there are.
    """
    step = _find_step(run, stage)
    manifest = store.read_manifest(step.folder, shard)
    if manifest is None:
        done = sorted(store.manifests(step.folder))
        raise StageError(
            f"{step.key} shard {shard} is not done; done are: {done or 'none'}. Run {run.command(step.stage, store.url)}"
        )
    table = store.read_table(manifest.data, remake=f"`make {step.stage}`")
    if row is None:
        _show_shard(step, manifest, table, console)
        return
    if not 0 <= row < table.num_rows:
        rows = f"rows 0 to {table.num_rows - 1}" if table.num_rows else "no rows"
        raise StageError(f"{step.key} shard {shard} has {rows}, not {row}")
    if step.stage == "shard":
        _show_segment(table, row, console)
        return
    length = len(table["topk_ids"][row])
    if position is not None and not 0 <= position < length:
        raise StageError(f"row {row} of {step.key} shard {shard} has positions 0 to {length - 1}, not {position}")
    from pipeline import explain

    views = {"logits": explain.show_logits, "align": explain.show_aligned, "fuse": explain.show_fused}
    views[step.stage](explain.Place(run, store, step, shard, row), table, position, console)


def _find_step(run: ResolvedRun, stage: str) -> Step:
    shown = [step for step in run.steps.values() if step.stage in ("shard", "logits", "align", "fuse")]
    matching = [step for step in shown if step.key == stage] or [step for step in shown if step.stage == stage]
    if len(matching) != 1:
        raise StageError(f"inspect shows one of {', '.join(step.key for step in shown)}, not {stage!r}")
    return matching[0]


def _show_shard(step: Step, manifest: Manifest, table: pa.Table, console: Console) -> None:
    console.print(
        f"{manifest.data.key}: {manifest.num_rows_out} rows, {manifest.num_tokens:,} tokens, attempt {manifest.attempt}"
    )
    keys = [name for name in ("doc_id", "segment", "split", "block", "is_last") if name in table.schema.names]
    view = Table("row", *keys, "tokens" if "token_ids" in table.schema.names else "size")
    for row in range(min(table.num_rows, MAX_ROWS)):
        size = len(table["text"][row].as_py()) if step.stage == "shard" else len(table["topk_ids"][row])
        view.add_row(str(row), *(str(table[name][row].as_py()) for name in keys), str(size))
    console.print(view)
    if table.num_rows > MAX_ROWS:
        console.print(f"... and {table.num_rows - MAX_ROWS} more rows; choose one with --segment")


def _show_segment(table: pa.Table, row: int, console: Console) -> None:
    values = {name: table[name][row].as_py() for name in table.schema.names}
    text = values.pop("text")
    console.print(", ".join(f"{name} {value}" for name, value in values.items()))
    console.print(Text(text))


# --- parts that the views of single positions share --------------------------------------------------------------------


def distribution_table(title: str, entries: Iterable[tuple[str, float]], tail_mass: float | None) -> Table:
    """A small table of tokens and probabilities."""
    table = Table(title=title, width=31, title_justify="left", title_style="bold")
    table.add_column("token", no_wrap=True, overflow="ellipsis")
    table.add_column("prob", justify="right")
    for text, probability in entries:
        table.add_row(Text(visible(text)), f"{probability:.4f}")
    if tail_mass is not None:
        table.add_row(Text("(the rest)", style="dim"), f"{tail_mass:.4f}")
    return table


def side_by_side(*tables: Table) -> Columns:
    """Tables beside each other, three in 100 columns."""
    return Columns(tables, padding=(0, 1))


def plan_table(title: str, rows: Sequence[str], columns: Sequence[str], values: np.ndarray) -> Table:
    """A matrix with labels: source candidates down, target candidates across; the columns of most mass, in percent."""
    kept = np.sort(np.argsort(-values.sum(axis=0), kind="stable")[:MAX_PLAN_COLUMNS])
    left_out = len(columns) - len(kept)
    more = f"; {left_out} columns of less mass are not shown" if left_out else ""
    table = Table(title=title + more, title_justify="left", title_style="bold", padding=(0, 0), pad_edge=False)
    table.add_column("", no_wrap=True, overflow="ellipsis", max_width=11)
    for column in kept:
        table.add_column(Text(visible(columns[column])), justify="right", no_wrap=True, overflow="ellipsis", width=6)
    for label, row in zip(rows, values, strict=True):
        cells = [f"{100 * row[column]:.1f}" if row[column] >= 5e-4 else "·" for column in kept]
        table.add_row(Text(visible(label)), *cells)
    return table


def token_line(tokens: Sequence[str], position: int) -> Text:
    """Tokens around a position, the position's own in reverse video."""
    first = max(0, position - MAX_TOKENS // 2)
    line = Text("… " if first else "")
    for index, token in enumerate(tokens[first : first + MAX_TOKENS], first):
        line.append(visible(token), style="reverse" if index == position else "")
        line.append("|", style="dim")
    return line
