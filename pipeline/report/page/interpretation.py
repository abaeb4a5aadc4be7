"""Section of the page on the effect of fusing: the tables of ``ptafuse interpret``, and plots of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.analysis.interpret.tables import (
    distance_table,
    interpretations,
    label,
    pair_tables,
    sample_of,
    win_tables,
)
from pipeline.report.page.plots import Bar, bars, shares
from pipeline.run.steps import ResolvedRun
from stages.contract.store import Store


def described_interpretations(runs: Sequence[ResolvedRun], store: Store) -> list[dict[str, Any]]:
    """Prepare every interpreted configuration for the template."""
    return [
        {
            "name": name,
            "is_first": index == 0,
            "sample": sample_of(figures),
            "distances": distance_table(name, figures),
            "distance_plot": _distance_plot(figures),
            "wins": win_tables(name, figures),
            "win_plots": _win_plots(figures),
            "pairs": pair_tables(name, figures),
        }
        for index, (name, figures) in enumerate(interpretations(runs, store))
    ]


def _distance_plot(figures: Mapping[str, Any]) -> str:
    """Plot Inner Distances, then Center Distances, with one colour per distribution."""
    entries = [
        Bar(
            f"{distance}: {label(row['name'], figures)}", row[key]["mean"], row[key]["error"], group=group, signed=False
        )
        for distance, key in (("Inner", "inner"), ("Center", "center"))
        for group, row in enumerate(figures["distances"])
        if row[key]["mean"] is not None and not (key == "center" and row["name"] == figures["target"])
    ]
    return bars(entries, axis=f"distance in {figures['target']}'s input embeddings") if entries else ""


def _win_plots(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Plot who wins; return pairs of (title, plot)."""
    candidates = [figures["target"], *figures["sources"]]
    judged = (
        (f"Who wins by cross-entropy of the {figures['granularity']}", "num_fused", "shares"),
        ("Which candidate gives the gold next token the highest probability", "num_contested", "token_shares"),
    )
    plots = []
    for words, count, key in judged:
        rows = {row["kind"]: [row[key][name]["mean"] for name in candidates] for row in figures["wins"] if row[count]}
        if rows:
            plots.append((f"{words}, by kind of document", shares(rows, candidates, axis="positions")))
    return plots
