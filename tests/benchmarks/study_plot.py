"""Plot of docs/study.md: the effect of fusing on each kind of text that is not in the training text.

``python -m tests.benchmarks.study_plot RUN TEXT BASELINE VARIANT OUT.svg``: paired differences of the cells whose
configurations are called BASELINE-seedN and VARIANT-seedN, over all seeds that both have.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluation.paired import document_differences, document_kinds
from pipeline.run.outcomes import read_result
from pipeline.run.records import recorded_runs
from pipeline.run.stage_table import FUSED, eval_key
from stages.contract.store import Store
from stages.measures.standard_error import weighted_mean
from tests.benchmarks.measure import say


def results(run_url: str, text: str) -> dict[tuple[str, int], Mapping[str, Any]]:
    """Return the evaluations on a text: (configuration without its seed, seed) -> result."""
    store = Store(run_url)
    found: dict[tuple[str, int], Mapping[str, Any]] = {}
    for run in recorded_runs(store):
        parts = re.fullmatch(r"(.+)-seed(\d+)", run.config.name)
        step = run.steps.get(eval_key(FUSED, text))
        result = None if parts is None or step is None else read_result(store, step)
        if parts is not None and result is not None:
            found[parts[1], int(parts[2])] = result
    return found


def differences(
    found: Mapping[tuple[str, int], Mapping[str, Any]], baseline: str, variant: str
) -> tuple[dict[str, tuple[float, float]], int]:
    """Return each kind's difference in bits per byte and its standard error over documents, and the number of seeds.

    Raises:
        SystemExit: no seed has both.
    """
    seeds = sorted(seed for name, seed in found if name == variant and (baseline, seed) in found)
    if not seeds:
        sys.exit(f"no seed has both {baseline} and {variant}; there are {sorted({name for name, _ in found})}")
    pairs = [(found[variant, seed], found[baseline, seed]) for seed in seeds]
    means = np.mean([document_differences(*pair)[0] for pair in pairs], axis=0)  # over seeds, document by document
    _, weights = document_differences(*pairs[0])
    kinds = np.array(document_kinds(*pairs[0]))
    by_kind = {}
    for kind in np.unique(kinds):
        estimate = weighted_mean(means[kinds == kind], weights[kinds == kind])
        by_kind[str(kind)] = (estimate.mean, estimate.error)
    return by_kind, len(seeds)


def draw(by_kind: Mapping[str, tuple[float, float]], title: str, out: Path) -> None:
    """Draw one bar per kind, with the largest gain at the top."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "study"  # the same file for the same figures
    order = sorted(by_kind, key=lambda kind: -by_kind[kind][0])
    figure = Figure(figsize=(7, 0.28 * len(order) + 1), layout="constrained")
    axes = figure.subplots()
    values = [by_kind[kind][0] for kind in order]
    errors = [np.nan_to_num(by_kind[kind][1]) for kind in order]
    axes.barh(
        order, values, xerr=errors, color=["#2a78b8" if value < 0 else "#c2542d" for value in values], ecolor="#444"
    )
    axes.axvline(0, color="#444", linewidth=0.8)
    axes.set_xlabel("bits per byte, fused minus gold tokens only (left: fused is better)")
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, metadata={"Date": None})
    say(f"{out}: {len(order)} kinds")


def main(run_url: str, text: str, baseline: str, variant: str, out: str) -> None:
    """Draw one plot."""
    by_kind, num_seeds = differences(results(run_url, text), baseline, variant)
    words = f"{num_seeds} seed{'s' * (num_seeds > 1)}; lines: one standard error over documents"
    draw(by_kind, f"{len(by_kind)} kinds of text that were left out, {words}", Path(out))


if __name__ == "__main__":
    if len(sys.argv) != 6:
        sys.exit("expected RUN TEXT BASELINE VARIANT OUT.svg")
    main(*sys.argv[1:])
