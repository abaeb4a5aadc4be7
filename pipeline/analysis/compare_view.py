"""How ``ptafuse compare`` is shown: a table for people, JSON for programs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.analysis.compare import SOURCE_ROW, TARGET_ROW, Comparison, Tail, Way
from pipeline.run.session import StageError
from pipeline.settings.run import RunConfig
from stages.measures.standard_error import Estimate


def comparison_json(config: RunConfig, comparisons: Sequence[Comparison], tail: Tail) -> dict[str, Any]:
    """For ``ptafuse compare --json``: nats; null where there is nothing to take a mean of."""
    return {
        "config": config.name,
        "target": config.target.name,
        "tail": tail,
        "sources": [
            {
                "source": found.source,
                "shards": list(found.shards),
                "num_shards": found.num_shards,
                "num_positions": found.num_positions,
                "num_shared_positions": found.found.num_positions,
                "num_documents": found.found.num_documents,
                "rows": [
                    {**_way_json(way), **_finite(asdict(found.found.entries[label]))} for label, way in _rows(found)
                ],
            }
            for found in comparisons
        ],
    }


def print_comparison(config: RunConfig, found: Comparison, tail: Tail, console: Console) -> None:
    """Show one source's table."""
    shared = found.found
    if not shared.num_positions:
        raise StageError(
            f"{found.source}: none of the {found.num_positions:,} positions has a distribution under every way of aligning; "
            "read more shards with --shards"
        )
    handled = "probabilities as they are" if tail == "bucket" else "each top-k rescaled to 1"
    table = Table(
        title=f"Teacher NLL, {found.source} for {config.target.name}: mean -ln p(gold next token), nats, floor 1e-4; tail "
        f"{tail} ({handled}). On the {shared.num_positions:,} of {found.num_positions:,} positions that every row has; "
        f"{shared.num_documents:,} documents, {len(found.shards)} of {found.num_shards} shards; ± standard error over "
        "documents",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    for column in ("distribution", "pairing"):
        table.add_column(column, no_wrap=True)
    columns = ("epsilon", "NLL", "against target", "mixed with it", "coverage", "against target,\nall it covers")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for label, way in _rows(found):
        entry = shared.entries[label]
        is_target = label == TARGET_ROW
        epsilon = way.epsilon if way else None
        table.add_row(
            f"{way.name}{' *' if way.is_configured else ''}" if way else label,
            way.settings.pairing if way else "",
            "" if epsilon is None else f"{epsilon:.3g}",
            f"{entry.nll.mean:.3f}",
            "" if is_target else _signed(entry.difference),
            "" if is_target else _signed(entry.mixed_difference),
            f"{entry.coverage:.1%}",
            "" if is_target else _signed(entry.own_difference),
        )
    console.print(table)
    console.print(
        f"The models themselves: their own top {config.align.top_k}, each for its own next token (the source's is another "
        "event where its token is longer or shorter). Mixed with it: the best mixture of a row and the target, against the "
        "target; a row that only leans to a target better than itself gains in NLL, and nothing here. * as the "
        "configuration says, but for `inexact` and `tail`, which all rows share."
    )


def _rows(found: Comparison) -> list[tuple[str, Way | None]]:
    return [(TARGET_ROW, None), (SOURCE_ROW, None), *((way.label, way) for way in found.ways)]


def _signed(estimate: Estimate) -> str:
    return f"{estimate.mean:+.3f} ± {estimate.error:.3f}"


def _way_json(way: Way | None) -> dict[str, Any]:
    if way is None:
        return {}
    return {
        "name": way.name,
        "is_configured": way.is_configured,
        "epsilon": way.epsilon,
        "settings": way.settings.result_settings(),
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Estimate):
        return {"mean": _finite(value.mean), "error": _finite(value.error)}
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
