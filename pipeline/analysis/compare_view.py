"""Output of ``ptafuse compare``: a table for people, JSON for programs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.analysis.compare import SOURCE_ROW, TARGET_ROW, AlignmentVariant, Comparison
from pipeline.run.session import StageError
from pipeline.settings.run import RunConfig
from stages.measures.standard_error import Estimate


def comparison_json(config: RunConfig, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Build the output of ``ptafuse compare --json``, in nats; null for a mean of nothing."""
    return {
        "config": config.name,
        "target": config.target.name,
        "sources": [
            {
                "source": comparison.source,
                "shards": list(comparison.shards),
                "num_shards": comparison.num_shards,
                "num_positions": comparison.num_positions,
                "num_shared_positions": comparison.completed.num_positions,
                "num_documents": comparison.completed.num_documents,
                "rows": [
                    {
                        **_variant_json(variant),
                        "completed": _finite(asdict(comparison.completed.entries[label])),
                        "floored": _finite(asdict(comparison.floored.entries[label])),
                    }
                    for label, variant in _rows(comparison)
                ],
            }
            for comparison in comparisons
        ],
    }


def print_comparison(config: RunConfig, comparison: Comparison, console: Console) -> None:
    """Show one source's table."""
    shared = comparison.completed
    if not shared.num_positions:
        raise StageError(
            f"{comparison.source}: none of the {comparison.num_positions:,} positions has a distribution under every way of "
            "aligning; read more shards with --shards"
        )
    table = Table(
        title=f"Teacher NLL, {comparison.source} for {config.target.name}: mean -ln p(gold next token), nats, completed: what "
        f"a row does not list is divided in the target's proportions. On the {shared.num_positions:,} of "
        f"{comparison.num_positions:,} positions that every row has; {shared.num_documents:,} documents, "
        f"{len(comparison.shards)} of {comparison.num_shards} shards; ± standard error over documents",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    for column in ("distribution", "pairing"):
        table.add_column(column, no_wrap=True)
    columns = ("NLL", "against target", "mixed with it", "covers", "against it on\nall it covers", "floored\nNLL")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for label, variant in _rows(comparison):
        entry = shared.entries[label]
        is_target = label == TARGET_ROW
        table.add_row(
            _named(variant) if variant else label,
            variant.settings.pairing if variant else "",
            f"{entry.nll.mean:.3f}",
            "" if is_target else entry.difference.signed(3),
            "" if is_target else entry.mixed_difference.signed(3),
            f"{entry.coverage:.1%}",
            "" if is_target else entry.own_difference.signed(3),
            f"{comparison.floored.entries[label].nll.mean:.3f}",
        )
    console.print(table)
    console.print(
        "The models themselves: their full distributions, each for its own next token (a different event for the "
        "source where its token is longer or shorter). Mixed with it: the best mixture of a row and the target, "
        "against the target; a row that merely moves towards a target better than itself improves its NLL, but not "
        f"this figure. Floored: every row rescaled to 1, the models' own top {config.align.top_k} too, and 1e-4 for a "
        "gold token that it does not list; only compare it with the target's floored NLL. The conditioned row covers "
        "positions inside a source token as well (inexact = 'condition'). A number is epsilon. * as the configuration "
        "says, except for `tail`, which all rows share, and `inexact`, unless it conditions."
    )


def _named(variant: AlignmentVariant) -> str:
    epsilon = "" if variant.epsilon is None else f" {variant.epsilon:.3g}"
    return f"{variant.name}{epsilon}{' *' if variant.is_configured else ''}"


def _rows(comparison: Comparison) -> list[tuple[str, AlignmentVariant | None]]:
    return [(TARGET_ROW, None), (SOURCE_ROW, None), *((variant.label, variant) for variant in comparison.variants)]


def _variant_json(variant: AlignmentVariant | None) -> dict[str, Any]:
    if variant is None:
        return {}
    return {
        "name": variant.name,
        "is_configured": variant.is_configured,
        "epsilon": variant.epsilon,
        "settings": variant.settings.result_settings(),
    }


def _finite(value: Any) -> Any:
    """Replace NaN, which JSON does not have, by None."""
    if isinstance(value, Estimate):
        return {"mean": _finite(value.mean), "error": _finite(value.error)}
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
