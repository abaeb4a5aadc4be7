"""``ptafuse inspect``: rows of a shard as text."""

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from pipeline.run.session import StageError
from pipeline.run.steps import ResolvedRun, Step
from stages.contract.manifest import Manifest
from stages.contract.store import Store

MAX_ROWS = 20


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
        console: console to print on.

    Raises:
        StageError: the step, shard, row or position does not exist; the message lists the existing ones.
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
        _show_shard(manifest, table, console)
        return
    if not 0 <= row < table.num_rows:
        rows = f"rows 0 to {table.num_rows - 1}" if table.num_rows else "no rows"
        raise StageError(f"{step.key} shard {shard} has {rows}, not {row}")
    if position is not None and "topk_ids" in table.schema.names:
        length = len(table["topk_ids"][row])
        if not 0 <= position < length:
            raise StageError(f"row {row} of {step.key} shard {shard} has positions 0 to {length - 1}, not {position}")
    from pipeline.analysis.positions import VIEWS, InspectedRow

    VIEWS[step.stage](InspectedRow(run, store, step, shard, row), table, position, console)


def _find_step(run: ResolvedRun, stage: str) -> Step:
    shown = run.sharded_steps
    matching = [step for step in shown if step.key == stage] or [step for step in shown if step.stage == stage]
    if len(matching) != 1:
        raise StageError(f"inspect shows one of {', '.join(step.key for step in shown)}, not {stage!r}")
    return matching[0]


def _show_shard(manifest: Manifest, table: pa.Table, console: Console) -> None:
    console.print(
        f"{manifest.data.key}: {manifest.num_rows_out} rows, {manifest.num_tokens:,} tokens, attempt {manifest.attempt}"
    )
    keys = [name for name in ("doc_id", "segment", "split", "block", "is_last") if name in table.schema.names]
    view = Table("row", *keys, "tokens" if "token_ids" in table.schema.names else "size")
    for row in range(min(table.num_rows, MAX_ROWS)):
        size = len(table["topk_ids"][row]) if "topk_ids" in table.schema.names else len(table["text"][row].as_py())
        view.add_row(str(row), *(str(table[name][row].as_py()) for name in keys), str(size))
    console.print(view)
    if table.num_rows > MAX_ROWS:
        console.print(f"... and {table.num_rows - MAX_ROWS} more rows; choose one with --segment")
