"""``ptafuse inspect``: rows of a shard as text."""

import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.text import Text

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
    from pipeline.analysis import positions

    views = {"logits": positions.show_logits, "align": positions.show_aligned, "fuse": positions.show_fused}
    views[step.stage](positions.Place(run, store, step, shard, row), table, position, console)


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
