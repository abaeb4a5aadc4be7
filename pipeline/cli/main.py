"""Entry point of the command ``ptafuse``."""

import logging
import os
import sys
from typing import Final

import typer

from pipeline.cli import read, repair, run

# Training steps are shown from their log, not as log messages.
NOISY_LOGGERS: Final = ("httpx", "filelock", "ray", "datasets", "accelerate", "lm_eval", "train")

app = typer.Typer(
    name="ptafuse",
    help="Fuse the knowledge of several language models into one (Probabilistic Token Alignment).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for commands in (run.app, read.app, repair.app):
    app.add_typer(commands)


def main() -> None:
    """Entry point: an error that the user can mend is a message, not a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in NOISY_LOGGERS:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        app()
    except (OSError, ValueError, RuntimeError, ImportError) as error:  # ConfigError and StageError among them
        if os.environ.get("PTAFUSE_TRACEBACK"):
            raise
        sys.stderr.write(f"ptafuse: {error}\n")
        sys.exit(1)
