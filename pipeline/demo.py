"""``make demo``: the whole pipeline on two small real models, in variants that differ in one thing each."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from pipeline.cli import run_all_stages
from pipeline.demo_data import prepare
from pipeline.report.terminal import print_report
from pipeline.run.session import open_run
from pipeline.run.steps import Request
from stages.contract.store import Store

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


def run_demo(run_url: str, console: Console, *, local: bool) -> None:
    """Fetch what the demo needs, run every stage of every variant, evaluate, and print the table."""
    prepare(DEMO_DATA)
    started = time.monotonic()
    for variant in VARIANTS:
        console.rule(f"{variant.name}: {', '.join(variant.overrides)}", align="left")
        run = open_run(Request(DEMO_CONFIG, variant.overrides), run_url, console, local=local)
        run_all_stages(run)
    print_report(Store(run_url), console)
    console.print(f"make demo took {time.monotonic() - started:.0f} s after the downloads")
