"""Commands that read a configuration or a run, and compute no shards."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipeline.cli.options import (
    DEFAULT_CONFIG,
    DEFAULT_RUN,
    ConfigArgument,
    ConfigNameOption,
    JsonOption,
    RunArgument,
    RunOption,
    SetOption,
    console,
)
from pipeline.run.records import recorded_run
from pipeline.run.steps import Request
from stages.contract.store import Store

app = typer.Typer()


@app.command()
def plan(
    config: ConfigArgument = DEFAULT_CONFIG,
    run: RunOption = DEFAULT_RUN,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is done, pending and stale, and why, and estimate the tokens, hours, bytes and money of the rest.

    Downloads and records nothing.
    """
    from pipeline.forecast.forecaster import forecast
    from pipeline.forecast.view import forecast_json, print_forecast
    from pipeline.run.preflight import refuse_unusable_models
    from pipeline.run.resolve import resolve
    from pipeline.settings.load import load_config

    request = Request(config, tuple(sets or ()))
    loaded = load_config(request.config_path, request.overrides)
    refuse_unusable_models(loaded, may_ask_hub=False)
    store = Store(run)
    config_forecast = forecast(resolve(loaded, store, request), store)
    if as_json:
        sys.stdout.write(json.dumps(forecast_json(config_forecast), indent=1, allow_nan=False) + "\n")
    else:
        print_forecast(config_forecast, console())


@app.command()
def status(
    run: RunArgument = DEFAULT_RUN,
    as_json: JsonOption = False,
    watched: Annotated[bool, typer.Option("--watch", help="Update until everything is done, or Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two updates of --watch.")] = 5.0,
    all_metrics: Annotated[bool, typer.Option("--all", help="Show every health metric of every step.")] = False,
    config: ConfigNameOption = None,
) -> None:
    """Show what is done, pending and failed, and what to run next. Reads only the run directory."""
    from pipeline.state.status import StatusReader
    from pipeline.state.status_view import print_status, status_json

    store = Store(run)
    reader = StatusReader(recorded_run(store, config), store)
    if watched:
        from pipeline.state.watch import watch

        try:
            watch(reader.read, console(), interval=interval)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None  # the shell's exit code for a program that Ctrl-C ended
        return
    run_status = reader.read()
    if as_json:
        sys.stdout.write(json.dumps(status_json(run_status), indent=1) + "\n")
    else:
        print_status(run_status, console(), all_metrics=all_metrics)


@app.command()
def inspect(
    run: RunArgument,
    stage: Annotated[str, typer.Argument(help="shard, logits/MODEL, align/SOURCE or fuse.")],
    number: Annotated[int, typer.Argument(metavar="SHARD", min=0, help="Shard number, from 0.")],
    segment: Annotated[
        int | None, typer.Option(help="Row of the shard, from 0 (a segment, or a block of fuse).")
    ] = None,
    position: Annotated[int | None, typer.Option(help="Position in the row, from 0.")] = None,
    config: ConfigNameOption = None,
) -> None:
    """Show rows of a shard as text: tokens, pairing, top-k lists, transport plan, fused distribution."""
    from pipeline.analysis.inspect import show

    store = Store(run)
    show(recorded_run(store, config), store, stage, number, segment, position, console())


@app.command()
def report(
    run: RunArgument = DEFAULT_RUN,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write a self-contained page.")
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the page on this machine's loopback address.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --serve; 0 takes a free one.")] = 8700,
) -> None:
    """Show the results in a run directory: tables, or a page with plots and a viewer of documents, token by token."""
    from pipeline.report.terminal import print_report, serve_page, write_page

    store = Store(run)
    if serve:
        serve_page(store, console(), port=port)
        return
    print_report(store, console())
    if html is not None:
        write_page(store, html, console())


@app.command()
def compare(
    config: ConfigArgument = DEFAULT_CONFIG,
    run: RunOption = DEFAULT_RUN,
    sets: SetOption = None,
    source: Annotated[str | None, typer.Option(help="Name of one source; by default all.")] = None,
    shards: Annotated[
        int | None,
        typer.Option(min=1, help="Number of shards to read, evenly spread; by default as many as 100,000 tokens need."),
    ] = None,
    epsilon: Annotated[
        list[float] | None, typer.Option(help="Another epsilon to try with both presets; repeatable.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the teacher NLL of all alignment methods on the same positions, from finished logits.

    Writes nothing.
    """
    from pipeline.analysis.compare import compare as compare_run
    from pipeline.analysis.compare_view import comparison_json, print_comparison

    request = Request(config, tuple(sets or ()))
    loaded, comparisons = compare_run(request, run, source=source, num_shards=shards, epsilons=tuple(epsilon or ()))
    if as_json:
        sys.stdout.write(json.dumps(comparison_json(loaded, comparisons), indent=1) + "\n")
        return
    for comparison in comparisons:
        print_comparison(loaded, comparison, console())


@app.command()
def interpret(
    config: ConfigArgument = DEFAULT_CONFIG,
    run: RunOption = DEFAULT_RUN,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how far fusing moves the target, which model wins on each kind of document, and the most moved tokens."""
    from pipeline.analysis.interpret.run import interpret as interpret_run
    from pipeline.analysis.interpret.tables import interpretation_tables
    from pipeline.display.table import print_table
    from pipeline.run.session import open_run

    progress = Console(stderr=True) if as_json else console()
    opened = open_run(Request(config, tuple(sets or ())), run, progress, local=True)
    interpretation = interpret_run(opened)
    if as_json:
        sys.stdout.write(json.dumps(interpretation, indent=1, allow_nan=False) + "\n")
        return
    for table in interpretation_tables(opened.config.name, interpretation):
        print_table(table, console())


@app.command(name="config")
def show_config(config: ConfigArgument = DEFAULT_CONFIG, sets: SetOption = None) -> None:
    """Print the resolved configuration, with every default and preset filled in."""
    from pipeline.settings.load import load_config

    sys.stdout.write(load_config(config, tuple(sets or ())).model_dump_json(indent=1, by_alias=True) + "\n")
