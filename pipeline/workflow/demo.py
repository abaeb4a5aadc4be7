"""``make demo``: the whole pipeline on two small real models, in variants that differ in one thing each."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from pipeline.run.session import open_run
from pipeline.run.steps import Request
from pipeline.workflow.demo_data import prepare
from pipeline.workflow.stages import run_all_stages

DEMO_CONFIG: Final = "pipeline/configs/demo.toml"
DEMO_DATA: Final = Path("demo-data")


@dataclass(frozen=True)
class Variant:
    """One row of the demo's table: the shipped configuration with a few settings changed."""

    name: str
    overrides: tuple[str, ...]


VARIANTS: Final = (
    Variant("semi-relaxed", ("name=demo",)),
    Variant("paper", ("name=demo-paper", "align.preset=paper")),
    Variant("gold-only", ("name=demo-gold-only", "train.lambda=1.0")),
)
"""Same data, steps and seed; ``gold-only`` does not look at the fused distributions."""


def run_demo(run_url: str, console: Console, *, local: bool) -> float:
    """Fetch what the demo needs, and run every stage of every variant.

    Returns:
        Seconds that it took, downloads left out.
    """
    prepare(DEMO_DATA)
    started = time.monotonic()
    for variant in VARIANTS:
        console.rule(f"{variant.name}: {', '.join(variant.overrides)}", align="left")
        run = open_run(Request(DEMO_CONFIG, variant.overrides), run_url, console, local=local)
        run_all_stages(run)
    return time.monotonic() - started
