"""Plot of docs/study.md: the effect of fusing on each kind of text that is not in the training text.

``python -m tests.benchmarks.study_plot RUN TEXT OUT.svg BASELINE VARIANT=LABEL ...``: paired differences of the cells whose
configurations are called VARIANT-seedN and BASELINE-seedN, over all seeds that both have; one bar per variant and kind.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from pipeline.evaluation.paired import document_differences, document_kinds
from pipeline.run.outcomes import read_result
from pipeline.run.records import recorded_runs
from pipeline.run.stage_table import FUSED, eval_key
from stages.contract.store import Store
from stages.measures.standard_error import weighted_mean
from tests.benchmarks.measure import say

COLORS: Final = ("#2a78b8", "#b8b2a8", "#c2542d")
"""Of the variants, in their order."""


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


def draw(bars: Mapping[str, Mapping[str, tuple[float, float]]], title: str, out: Path) -> None:
    """Draw a group of bars per kind, with the largest gain of the first label at the top.

    Args:
        bars: label -> kind -> difference and its standard error.
        title: of the plot.
        out: file to write, SVG.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "study"  # the same file for the same figures
    first = next(iter(bars.values()))
    kinds = sorted(first, key=lambda kind: -first[kind][0])
    height = 0.8 / len(bars)
    figure = Figure(figsize=(7, (0.14 + 0.14 * len(bars)) * len(kinds) + 1), layout="constrained")
    axes = figure.subplots()
    for place, (label, by_kind) in enumerate(bars.items()):
        axes.barh(
            np.arange(len(kinds)) + height * ((len(bars) - 1) / 2 - place),
            [by_kind[kind][0] for kind in kinds],
            height,
            xerr=[np.nan_to_num(by_kind[kind][1]) for kind in kinds],
            label=label,
            color=COLORS[place],
            ecolor="#444",
        )
    axes.set_yticks(np.arange(len(kinds)), kinds)
    axes.axvline(0, color="#444", linewidth=0.8)
    axes.set_xlabel("bits per byte, minus those of gold tokens only (left: better)")
    axes.set_title(title, fontsize=9)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, metadata={"Date": None})
    say(f"{out}: {len(kinds)} kinds")


def main(run_url: str, text: str, out: str, baseline: str, variants: Mapping[str, str]) -> None:
    """Draw one plot.

    Args:
        run_url: the run directory.
        text: name of the evaluated text.
        out: file to write.
        baseline: the cells to compare with.
        variants: cells -> label.
    """
    found = results(run_url, text)
    compared = {label: differences(found, baseline, variant) for variant, label in variants.items()}
    seeds = ", ".join(dict.fromkeys(f"{count} seed{'s' * (count > 1)}" for _, count in compared.values()))
    num_kinds = len(next(iter(compared.values()))[0])
    title = f"{num_kinds} kinds of text that were left out, {seeds}; lines: one standard error over documents"
    draw({label: by_kind for label, (by_kind, _) in compared.items()}, title, Path(out))


if __name__ == "__main__":
    if not 6 <= len(sys.argv) <= 5 + len(COLORS) or not all("=" in pair for pair in sys.argv[5:]):
        sys.exit(f"expected RUN TEXT OUT.svg BASELINE VARIANT=LABEL ..., at most {len(COLORS)} variants")
    run_argument, text_argument, out_argument, baseline_argument = sys.argv[1:5]
    labels = dict(pair.rsplit("=", 1) for pair in sys.argv[5:])
    main(run_argument, text_argument, out_argument, baseline_argument, labels)
