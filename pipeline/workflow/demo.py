"""``make demo`` and ``make demo-chat``: shipped sweeps on two small real models, which are fetched first."""

import time
from pathlib import Path
from typing import Final

from rich.console import Console

from pipeline.workflow.chat_data import prepare_conversations
from pipeline.workflow.demo_data import prepare, prepare_models
from pipeline.workflow.sweep import load_sweep, run_sweep

DEMO_DATA: Final = Path("demo-data")
DEMO_SWEEP: Final = Path("pipeline/configs/sweeps/demo.toml")
CHAT_SWEEP: Final = Path("pipeline/configs/sweeps/demo-chat.toml")


def run_demo(run_url: str, console: Console, *, local: bool) -> float:
    """Fetch what the demo needs, and run the stages of every cell of its sweep.

    Returns:
        Seconds that it took, downloads left out.
    """
    prepare(DEMO_DATA)
    return _timed(DEMO_SWEEP, run_url, console, local=local)


def run_chat_demo(run_url: str, console: Console, *, local: bool) -> float:
    """Fetch the models, write the conversations, and run the stages of every cell of the sweep on conversations.

    Returns:
        Seconds that it took, downloads left out.
    """
    prepare_models(DEMO_DATA)
    prepare_conversations(DEMO_DATA)
    return _timed(CHAT_SWEEP, run_url, console, local=local)


def _timed(sweep: Path, run_url: str, console: Console, *, local: bool) -> float:
    started = time.monotonic()
    run_sweep(load_sweep(sweep), run_url, console, local=local)
    return time.monotonic() - started
