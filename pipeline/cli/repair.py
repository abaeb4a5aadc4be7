"""Commands that check a run directory and clean it up."""

from typing import Annotated

import typer

from pipeline.cli.options import DEFAULT_RUN, ConfigNameOption, RunArgument, console
from pipeline.run.records import recorded_run
from stages.contract.store import Store

app = typer.Typer()


@app.command()
def verify(
    run: RunArgument = DEFAULT_RUN,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Remove the manifests of bad shards, so that the shards are computed again."),
    ] = False,
) -> None:
    """Read every file of a run directory again, and compare it with its manifest."""
    from pipeline.run.session import StageError
    from pipeline.state.verify import verify_run

    problems = verify_run(Store(run), console(), repair=repair)
    if problems and not repair:
        raise StageError(f"{problems} files differ from their manifests; run `ptafuse verify {run} --repair`")


@app.command()
def gc(
    run: RunArgument = DEFAULT_RUN,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
    older_than: Annotated[
        str, typer.Option(metavar="DURATION", help="Keep files younger than this: 30m, 12h, 1d.")
    ] = "1d",
) -> None:
    """Remove files that killed attempts left and no manifest names, of all configurations."""
    from pipeline.display.durations import parse_duration
    from pipeline.state.garbage import collect_garbage

    seconds = parse_duration(older_than)
    collect_garbage(Store(run), console(), older_than_seconds=seconds, dry_run=dry_run)


@app.command()
def retry(run: RunArgument = DEFAULT_RUN, config: ConfigNameOption = None) -> None:
    """Forget the failed attempts of unfinished shards, so that the stage's command tries them again."""
    from pipeline.run.attempts import forget_failures

    store = Store(run)
    count = forget_failures(recorded_run(store, config), store)
    shards = "shard" if count == 1 else "shards"
    console().print(f"{count} failed {shards} will be tried again by the next command")
