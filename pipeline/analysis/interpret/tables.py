"""Tables of the figures of ``ptafuse interpret``, for the terminal and for the page."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.analysis.interpret.run import FUSED, folder_of, read_interpretation
from pipeline.display.table import ResultTable
from pipeline.run.steps import ResolvedRun
from stages.contract.store import Store


def interpretations(runs: Sequence[ResolvedRun], store: Store) -> list[tuple[str, dict[str, Any]]]:
    """Read the figures of every configuration that has some; configurations that share them are listed once.

    Returns:
        (labels of the configurations, figures).
    """
    names: dict[str, list[str]] = {}
    for run in runs:
        names.setdefault(folder_of(run), []).append(run.label)
    distinct = {folder_of(run): run for run in runs}
    recorded = [(", ".join(names[folder]), read_interpretation(run, store)) for folder, run in distinct.items()]
    return [(name, figures) for name, figures in recorded if figures is not None]


def interpretation_tables(name: str, figures: Mapping[str, Any]) -> list[ResultTable]:
    """Build all tables of one configuration."""
    return [distance_table(name, figures), *win_tables(name, figures), *pair_tables(name, figures)]


def sample_of(figures: Mapping[str, Any]) -> str:
    """Describe the sample that the figures are from."""
    return (
        f"{figures['num_positions']:,} positions of {figures['num_documents']:,} documents in "
        f"{len(figures['shards'])} of {figures['num_shards']} shards, seed {figures['settings']['seed']}"
    )


def label(name: str, figures: Mapping[str, Any]) -> str:
    """Return the display name of a distribution."""
    if name == figures["target"]:
        return f"{name}, its own"
    return name if name == FUSED else f"aligned {name}"


def distance_table(name: str, figures: Mapping[str, Any]) -> ResultTable:
    """Build the table of the Inner and Center Distance of each distribution."""
    rows = [
        (
            label(row["name"], figures),
            f"{row['num_positions']:,}",
            shown(row["inner"]),
            shown(row["own_inner"]),
            "" if row["name"] == figures["target"] else shown(row["inner_difference"], signed=True),
            "" if row["name"] == figures["target"] else shown(row["center"]),
        )
        for row in figures["distances"]
    ]
    return ResultTable(
        f"{name}: Inner Distance (spread of a distribution's tokens: 0 one, near 1 many unrelated ones) and Center Distance "
        "(to the centre of the target's own: 0 none, 1.41 one token against an unrelated one), in "
        f"{figures['target']}'s input embeddings; {sample_of(figures)}; ± standard error over documents",
        ("distribution", "positions", "Inner", "target's own", "difference", "Center"),
        tuple(rows),
    )


def win_tables(name: str, figures: Mapping[str, Any]) -> list[ResultTable]:
    """Build the tables of who wins, by kind of document: as configured, and token by token."""
    kinds = "by length" if figures["kind_column"] is None else f"column {figures['kind_column']!r}"
    return [
        _win_table(
            f"{name}: who wins by cross-entropy of the {figures['granularity']}, share of the positions that have a fused "
            f"distribution, by kind of document ({kinds}); tied ones in equal parts; ± standard error over documents",
            figures,
            ("num_fused", "num_tied", "shares"),
        ),
        _win_table(
            f"{name}: which candidate gives the gold next token the highest probability: share of the positions where "
            "more than one model has a distribution",
            figures,
            ("num_contested", "num_token_tied", "token_shares"),
        ),
    ]


def _win_table(title: str, figures: Mapping[str, Any], keys: tuple[str, str, str]) -> ResultTable:
    candidates = [figures["target"], *figures["sources"]]
    positions, tied, shares = keys
    rows = [
        (
            row["kind"],
            f"{row['num_documents']:,}",
            f"{row[positions]:,}",
            f"{row[tied]:,}",
            *(percent(row[shares][candidate]) for candidate in candidates),
        )
        for row in figures["wins"]
    ]
    return ResultTable(title, ("kind", "documents", "positions", "tied", *candidates), tuple(rows))


def pair_tables(name: str, figures: Mapping[str, Any]) -> list[ResultTable]:
    """Build the tables of the most moved pairs of tokens of each source."""
    return [_pair_table(name, figures, pairs) for pairs in figures["pairs"]]


def _pair_table(name: str, figures: Mapping[str, Any], pairs: Mapping[str, Any]) -> ResultTable:
    total = pairs["same_mass"] + pairs["moved_mass"]
    moved = pairs["moved_mass"] / total if total else 0.0
    rows = [(row["source"], row["target"], f"{row['mass']:.1f}", f"{row['share']:.2%}") for row in pairs["rows"]]
    return ResultTable(
        f"{name}: most moved pairs of tokens, {pairs['source']} to {figures['target']}: of a mass of {total:,.0f} (at "
        f"most 1 per position) {1 - moved:.1%} landed on a token of the same text, {moved:.1%} on another; shares are "
        "of the latter",
        (f"{pairs['source']} token", f"{figures['target']} token", "mass", "share"),
        tuple(rows),
        text_columns=(0, 1),
    )


def shown(estimate: Mapping[str, float | None], *, signed: bool = False) -> str:
    """Format a mean and its standard error."""
    if estimate["mean"] is None:
        return ""
    mean = f"{estimate['mean']:{'+' if signed else ''}.3f}"
    return mean if estimate["error"] is None else f"{mean} ± {estimate['error']:.3f}"


def percent(estimate: Mapping[str, float | None]) -> str:
    """Format a share and its standard error."""
    if estimate["mean"] is None:
        return ""
    mean = f"{estimate['mean']:.1%}"
    return mean if estimate["error"] is None else f"{mean} ± {estimate['error']:.1%}"
