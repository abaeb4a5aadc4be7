"""``make demo``: the shipped sweep ``demo`` on two small real models, which are fetched first."""

import time
from pathlib import Path
from typing import Final

from rich.console import Console

from pipeline.workflow.demo_data import prepare
from pipeline.workflow.sweep import load_sweep, run_sweep

DEMO_DATA: Final = Path("demo-data")
DEMO_SWEEP: Final = Path("pipeline/configs/sweeps/demo.toml")


def run_demo(run_url: str, console: Console, *, local: bool) -> float:
    """Fetch what the demo needs, and run the stages of every cell of its sweep.

    Returns:
        Seconds that it took, downloads left out.
    """
    prepare(DEMO_DATA)
    started = time.monotonic()
    run_sweep(load_sweep(DEMO_SWEEP), run_url, console, local=local)
    return time.monotonic() - started
