"""The command that examines a run's models and computes nothing."""

import typer

from pipeline.cli.options import DEFAULT_CONFIG, ConfigArgument, SetOption, console

app = typer.Typer()


@app.command()
def check(config: ConfigArgument = DEFAULT_CONFIG, sets: SetOption = None) -> None:
    """Examine the files of every model of a configuration, and name all that is wrong with them; loads no weights."""
    from pipeline.run.preflight import model_problems
    from pipeline.settings.load import load_config

    loaded = load_config(config, tuple(sets or ()))
    problems = model_problems(loaded)
    for model in loaded.models:
        own = [problem for problem in problems if problem.model == model.name]
        place = model.path or f"{model.hub}@{model.revision}"
        verdict = f"{len(own)} problem{'s' * (len(own) > 1)}" if own else "nothing wrong was found"
        console().print(f"{model.name} ({place}): {verdict}", soft_wrap=True)
        for problem in own:
            file = problem.file.removeprefix(f"{model.path}/") if model.path else problem.file
            where = "" if problem.file in ("", str(model.path)) else f"{file}: "
            console().print(f"  - {where}{problem.text}", soft_wrap=True)
    if problems:
        raise typer.Exit(1)
