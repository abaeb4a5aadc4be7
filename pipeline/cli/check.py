"""Command that checks the inputs of a run and computes nothing."""

import typer

from pipeline.cli.options import DEFAULT_CONFIG, ConfigArgument, SetOption, console

app = typer.Typer()


@app.command()
def check(config: ConfigArgument = DEFAULT_CONFIG, sets: SetOption = None) -> None:
    """Check the models, the dataset and the texts of a configuration, and list all problems; loads no weights."""
    from pipeline.run.preflight import dataset_problems, is_served, model_problems
    from pipeline.settings.load import load_config
    from stages.models.preflight.examine import unexamined

    loaded = load_config(config, tuple(sets or ()))
    problems = model_problems(loaded)
    for model in loaded.models:
        of_model = [problem for problem in problems if problem.model == model.name]
        messages = []
        for problem in of_model:
            file = problem.file.removeprefix(f"{model.path}/") if model.path else problem.file
            where = "" if problem.file in ("", str(model.path)) else f"{file}: "
            messages.append(f"{where}{problem.text}")
        left_out = unexamined(model, has_weights=not is_served(model))
        _show(model.name, str(model.path or f"{model.hub}@{model.revision}"), messages, left_out)
    of_datasets = dataset_problems(loaded)
    for dataset in (loaded.dataset, *loaded.eval.texts):
        messages = of_datasets[dataset.section]
        _show(dataset.section, str(dataset.path or f"{dataset.hub}@{dataset.revision}"), messages)
    if problems or any(of_datasets.values()):
        raise typer.Exit(1)


def _show(name: str, place: str, problems: list[str], left_out: str | None = None) -> None:
    verdict = f"{len(problems)} problem{'s' * (len(problems) > 1)}" if problems else "nothing wrong was found"
    if left_out is not None:
        verdict = f"{verdict}; {left_out}" if problems else left_out
    console().print(f"{name} ({place}): {verdict}", soft_wrap=True)
    for problem in problems:
        console().print(f"  - {problem}", soft_wrap=True)
