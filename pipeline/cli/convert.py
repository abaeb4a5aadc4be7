"""Command that converts pickled weights to safetensors."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import console

app = typer.Typer()


@app.command()
def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or the id of a hub model.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", help="A new folder, which also gets configuration and tokenizer; by default MODEL itself."
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Revision of a hub model, preferably a commit.")
    ] = None,
) -> None:
    """Convert pickled weights (pytorch_model.bin) to safetensors without running their code, and compare every tensor."""
    # Check the arguments before importing torch, so that a mistake is reported at once.
    if revision is not None and output is None:
        raise ValueError("--revision is for a model of the hub: also give --output, the folder to write to")
    if revision is None and not Path(model).is_dir():
        raise FileNotFoundError(
            f"{model} is not a folder: give one with config.json and pytorch_model.bin, or the id of a model of the hub with "
            "--revision and --output"
        )
    from stages.models import convert as conversion

    folder = Path(model) if revision is None else conversion.download(model, revision)
    shown = console()
    done = conversion.convert(
        folder, output or folder, on_file=lambda name: shown.print(f"{name}: written and compared", soft_wrap=True)
    )
    shown.print(
        f"{done.num_tensors} tensors, {done.num_bytes / 1e9:.2f} GB, are in {done.folder} as safetensors and equal the pickled "
        f"ones: give the model as `path = {str(done.folder.absolute())!r}`",
        soft_wrap=True,
    )
