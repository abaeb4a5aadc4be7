"""Options that the commands share, and the console that they print on."""

import os
import sys
from typing import Annotated

import typer
from rich.console import Console

DEFAULT_CONFIG = "pipeline/configs/demo.toml"
DEFAULT_RUN = "runs/demo"

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A TOML file, or the name of a shipped one.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run directory: a path, or an fsspec URL.")]
RunOption = Annotated[str, typer.Option("--run", help="The run directory: a path, or an fsspec URL.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable.")
]
LocalOption = Annotated[bool, typer.Option("--local", help="Compute in this process, without Ray.")]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Refuse library versions that differ from those of finished shards.")
]
UpstreamOption = Annotated[bool, typer.Option("--upstream", help="First run earlier stages that are incomplete.")]
ConfigNameOption = Annotated[
    str | None, typer.Option("--config", help="Name of a recorded configuration; by default the latest one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

PLAIN_WIDTH = 100
"""Width of tables that are written to a file or a pipe, in columns."""


def console() -> Console:
    """Create a console that prints texts as they are: Rich would read brackets in an error message as markup."""
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else PLAIN_WIDTH
    return Console(width=width, markup=False, highlight=False)
