"""Entry point of the command ``ptafuse``."""

import logging
import os
import sys
from typing import Final

import typer

from pipeline.cli import check, convert, read, repair, run
from stages.contract.tracebacks import VARIABLE, shows_tracebacks

# Training steps are shown from their log, not as log messages.
NOISY_LOGGERS: Final = ("httpx", "filelock", "ray", "datasets", "accelerate", "lm_eval", "train")

app = typer.Typer(
    name="ptafuse",
    help="Fuse the knowledge of several language models into one (Probabilistic Token Alignment).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for commands in (run.app, read.app, check.app, convert.app, repair.app):
    app.add_typer(commands)


def main() -> None:
    """Run the command line; an error that the user can fix is printed as a message, not as a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in NOISY_LOGGERS:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        app()
    except Exception as error:
        if shows_tracebacks():
            raise
        sys.stderr.write(f"ptafuse: {_message(error)}\n")
        sys.exit(1)


def _message(error: Exception) -> str:
    """Return what is said of an error: its own words where they were written for people (ConfigError, StageError)."""
    if isinstance(error, OSError | ValueError | RuntimeError | ImportError):
        return str(error)
    return f"{type(error).__name__}: {error}. This is an unexpected error: {VARIABLE}=1 shows where it comes from"
