"""Examine everything that a run reads, before its first stage computes anything."""

from pipeline.dataset.documents import check_dataset
from pipeline.dataset.files import DatasetError, reading
from pipeline.settings.adapt import SourceConfig
from pipeline.settings.run import RunConfig
from stages.models.config import ModelConfig
from stages.models.preflight.examine import examine
from stages.models.preflight.problem import Problem


class PreflightError(ValueError):
    """Models of a run cannot be used; the message names every problem."""

    def __init__(self, problems: list[Problem]) -> None:
        lines = [str(problem) for problem in problems]
        super().__init__(lines[0] if len(lines) == 1 else "\n".join([f"{len(lines)} problems:", *lines]))
        self.problems = problems


def model_problems(config: RunConfig, *, may_ask_hub: bool = True) -> list[Problem]:
    """Examine the target and the sources.

    Args:
        config: configuration of the run.
        may_ask_hub: load tokenizers of the hub, and ask it which weights it has.
    """
    problems = []
    for model in config.models:
        training = config.train if model is config.target else None
        if isinstance(model, SourceConfig) and model.adapt is not None:
            training = model.adapt.training(config.train, isolate=model.reads_conversations)
        problems += examine(
            model,
            trained=training is not None,
            isolated=training is not None and training.isolate_documents,
            has_weights=not is_served(model),
            may_ask_hub=may_ask_hub,
        )
    return problems


def is_served(model: ModelConfig) -> bool:
    """Return whether a model is asked for what it predicts at a server, so that its weights are not looked for here."""
    return isinstance(model, SourceConfig) and model.is_served


def refuse_unusable_models(config: RunConfig, *, may_ask_hub: bool = True) -> None:
    """Examine the models of a run.

    Raises:
        PreflightError: one of them cannot be used; names every problem of all of them.
    """
    problems = model_problems(config, may_ask_hub=may_ask_hub)
    if problems:
        raise PreflightError(problems)


def dataset_problems(config: RunConfig) -> dict[str, list[str]]:
    """Examine the dataset and the texts of the evaluation; one on the hub is asked for.

    Returns:
        Section of the configuration -> what is wrong there, at most one message.
    """
    problems: dict[str, list[str]] = {}
    for dataset in (config.dataset, *config.eval.texts):
        problems[dataset.section] = []
        try:
            reading(dataset, check_dataset, dataset)
        except (DatasetError, OSError) as error:
            problems[dataset.section].append(str(error))
    return problems
