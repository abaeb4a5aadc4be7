"""``[eval] suites``: run models through benchmarks. Each sub-task of a model is a separate result, computed once."""

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pipeline.evaluation.suites.catalogue import SUITES, Suite, selected
from pipeline.evaluation.suites.figures import figure
from pipeline.evaluation.suites.harness import (
    Data,
    HarnessMissingError,
    build_task,
    chat_template,
    harness_subtasks,
    harness_version,
    load_harness_model,
    score,
)
from pipeline.evaluation.suites.languages import LanguageMissingError, check_language
from pipeline.evaluation.suites.local_data import EXPECTED, LocalTask, local_tasks
from pipeline.evaluation.suites.multipl_e import MAX_NEW_TOKENS, NUM_LANGUAGES, languages_on_hub
from pipeline.run.session import Run, StageError, command
from pipeline.run.stage_table import FUSED
from pipeline.run.steps import Step
from pipeline.run.trained_model import evaluated_model, is_trained
from pipeline.settings.run import RunConfig
from stages.contract.fingerprint import fingerprint
from train.config import EvalConfig

log = logging.getLogger(__name__)

SUITE_VERSION = 1
FOLDER = "suites"


@dataclass(frozen=True)
class PlannedTask:
    """A sub-task that models are to go through.

    Attributes:
        suite: suite of the task.
        subtask: name of the sub-task.
        num_subtasks: number of sub-tasks of the whole suite.
        data: split -> documents; None where the harness fetches its own from the hub.
        data_identity: identity of the documents.
        num_fewshot: examples before each question.
        settings: all that changes a model's result, the data and the model left out.
        sandbox: isolation of the programs; empty for suites that do not run programs.
    """

    suite: Suite
    subtask: str
    num_subtasks: int
    data: Data | None
    data_identity: str
    num_fewshot: int
    settings: Mapping[str, Any]
    sandbox: Mapping[str, bool]

    def key(self, model: Mapping[str, str]) -> str:
        """Return the key of a model's result.

        Args:
            model: identity of the model.
        """
        inputs = {**model, "data": self.data_identity}
        task_fingerprint = fingerprint("suite", SUITE_VERSION, dict(self.settings), inputs)
        return f"{FOLDER}/{self.suite.name}/{self.subtask}/{task_fingerprint}.json"


def model_inputs(step: Step) -> dict[str, str]:
    """Return what identifies the model of an eval step: its weights and tokenizer, or the training that made it."""
    return {name: value for name, value in step.settings["inputs"].items() if name != "shard"}


def run_suites(run: Run, call: Callable[..., Iterator[Any]]) -> None:
    """Run every suite of the configuration that a model has no result for.

    Args:
        run: the run.
        call: runs work that loads a model, see ``eval_stage.run_eval``.

    Raises:
        StageError: a suite cannot be run here; says why, and what to do.
    """
    if not run.config.eval.suites:
        return
    tasks = plan_suites(run.config.eval, run.console)
    for name in _model_names(run.config):
        inputs = model_inputs(run.resolved.steps[f"eval/{name}"])
        pending = [task for task in tasks if not run.store.exists(task.key(inputs))]
        if not pending:
            run.console.print(f"suites of {name}: nothing to do")
            continue
        if name == FUSED and not is_trained(run):
            raise StageError(
                f"the trained model cannot be evaluated, because train is not complete: {command(run, 'train')}"
            )
        for line in call(run, f"suites of {name}", _run_tasks, name, inputs, pending):
            run.console.print(line, soft_wrap=True)


def _run_tasks(run: Run, name: str, inputs: Mapping[str, str], tasks: Sequence[PlannedTask]) -> Iterator[str]:
    """Run a model through sub-tasks; commit each result, then yield its line."""
    model: Any = None
    for planned in tasks:
        key = planned.key(inputs)
        # Ray calls this again after its worker died, and expects the same values in the same order.
        if run.store.exists(key):
            yield _line(name, json.loads(run.store.read(key)))
            continue
        task = _checked_here(planned)
        if model is None:
            step = run.resolved.steps[f"eval/{name}"]
            model = load_harness_model(
                evaluated_model(run, step), run.config.eval, cpus=max(1, int(run.config.eval_cpus))
            )
        result = _evaluate(model, name, inputs, task, limit=run.config.eval.limit)
        run.store.create(key, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
        yield _line(name, result)


def _checked_here(task: PlannedTask) -> PlannedTask:
    """Return a sub-task as this machine runs it, which may not be the machine that planned it.

    Raises:
        ImportError: the harness is not installed here.
        ValueError: this machine has another version of the harness, whose results have other names.
        LanguageMissingError: programs of the language cannot be run here.
    """
    machine, planned = socket.gethostname(), task.settings["harness"]
    try:
        version = harness_version()
    except HarnessMissingError as error:
        raise HarnessMissingError(f"{machine}: {error}") from None
    if version != planned:
        raise ValueError(
            f"lm-evaluation-harness on {machine} is {version}, and {planned} where the command was started: install the same "
            "version on all machines"
        )
    if task.suite.folder is not None:
        return task
    try:
        return replace(task, sandbox=_sandbox(task.subtask))
    except LanguageMissingError as error:
        raise LanguageMissingError(f"{machine}: {error}") from None


def _sandbox(language: str) -> dict[str, bool]:
    """Return how programs of a language are isolated on this machine."""
    isolation = check_language(language)
    return {"has_namespaces": isolation.has_namespaces, "is_read_only": isolation.is_read_only}


def check_suites(config: RunConfig, console: Console) -> None:
    """Refuse suites that cannot be run here before anything is computed.

    Raises:
        StageError: says why, and what to do.
    """
    if config.eval.suites:
        names = _model_names(config)
        if config.eval.apply_chat_template:
            _require_templates(config, names)
        plan_suites(config.eval, console)


def plan_suites(config: EvalConfig, console: Console) -> list[PlannedTask]:
    """List the sub-tasks that the configuration selects, with their data if it is local.

    Args:
        config: the evaluation's settings.
        console: shows what is left out of a suite, and why.

    Raises:
        StageError: the harness, a file, or a language is missing, or code would have to be executed without leave.
    """
    try:
        version = harness_version()
        folder = data_folder(config)
        return [
            _planned(SUITES[name], subtask, config, version, local)
            for name, wanted in selected(config.suites).items()
            for subtask, local in _subtasks(SUITES[name], wanted, folder, config, console).items()
        ]
    except (ImportError, LanguageMissingError, OSError, ValueError) as error:
        raise StageError(str(error)) from error


def data_folder(config: EvalConfig) -> Path | None:
    """Return the folder of the suites' files; None for the hub.

    Raises:
        FileNotFoundError: the configured folder is not there.
    """
    if config.data is not None:
        if not config.data.is_dir():
            raise FileNotFoundError(f"eval.data: the folder {config.data} does not exist")
        return config.data
    shared = os.environ.get("PTAFUSE_DATA")
    return Path(shared, "eval") if shared and Path(shared, "eval").is_dir() else None


def _model_names(config: RunConfig) -> Sequence[str]:
    known = [config.target.name, *(model.name for model in config.evaluated_sources), FUSED]
    names = config.eval.suite_models or (config.target.name, FUSED)
    for name in names:
        if name not in known:
            raise StageError(f"eval.suite_models: this run has no model {name!r}; its models: {', '.join(known)}")
    return names


def _require_templates(config: RunConfig, names: Sequence[str]) -> None:
    for name in names:
        model = config.target if name == FUSED else config.find_model(name)
        if chat_template(model) is None:
            raise StageError(
                f"eval.apply_chat_template: the tokenizer of {model.name} has no chat template: exclude {name} with "
                "eval.suite_models, or evaluate without templates"
            )


def _subtasks(
    suite: Suite, wanted: tuple[str, ...] | None, folder: Path | None, config: EvalConfig, console: Console
) -> dict[str, LocalTask | None]:
    """Map each sub-task to its local data, None for the hub."""
    if suite.folder is None and not config.execute_code:
        raise ValueError(
            f"the suite {suite.name} runs programs written by models: allow it with --execute-code, or execute_code = "
            "true in [eval]. They run in a sandbox; see docs/evaluation.md for what it does not isolate"
        )
    everything = languages_on_hub() if suite.folder is None else harness_subtasks(suite)
    available: Mapping[str, LocalTask | None]
    available = dict.fromkeys(everything) if folder is None else local_tasks(suite.name, folder)
    for subtask in wanted or available:
        if subtask not in available:
            place = "the harness" if folder is None else f"{folder} (expected {EXPECTED[suite.name]})"
            raise ValueError(f"{suite.name}/{subtask} is not in {place}; there: {', '.join(available)}")
        if suite.folder is not None and subtask not in everything:
            raise ValueError(f"{suite.name} has no sub-task {subtask!r}; it has: {', '.join(everything)}")
    names = wanted or tuple(available)
    if suite.folder is None:
        names = _runnable(names, console, insists=wanted is not None)
    return {name: available[name] for name in names}


def _runnable(languages: Sequence[str], console: Console, *, insists: bool) -> tuple[str, ...]:
    """List the languages whose programs run here; others are reported, or refused if they were named."""
    runnable = []
    for language in languages:
        try:
            isolation = check_language(language)
        except LanguageMissingError as error:
            if insists:
                raise
            console.print(f"multipl-e skips {error}", soft_wrap=True)
        else:
            runnable.append(language)
            if not isolation.has_namespaces:
                log.warning(
                    "multipl-e/%s: programs do not get separate namespaces on this system: they have network access, "
                    "and can write wherever their user can (docs/evaluation.md)",
                    language,
                )
    if not runnable:
        raise LanguageMissingError(f"multipl-e: none of the languages of {', '.join(languages)} can be run here")
    return tuple(runnable)


def _planned(suite: Suite, subtask: str, config: EvalConfig, version: str, local: LocalTask | None) -> PlannedTask:
    data = None if local is None else local.read()
    num_fewshot = suite.num_fewshot
    if data is not None and suite.fewshot_from == "dev split":
        num_fewshot = min(num_fewshot, len(data.get("dev", ())))
    settings = {
        "suite": suite.name,
        "subtask": subtask,
        "num_fewshot": num_fewshot,
        "limit": config.limit,
        "dtype": config.dtype,
        "harness": version,
        **({} if suite.folder else {"max_new_tokens": MAX_NEW_TOKENS}),
        # The model continues a program instead of answering a question, so its suite has no chat template.
        **({"apply_chat_template": True} if config.apply_chat_template and suite.folder else {}),
    }
    sandbox: dict[str, bool] = {}
    num_subtasks = NUM_LANGUAGES
    if suite.folder is None:
        sandbox = _sandbox(subtask)
    else:
        num_subtasks = len(harness_subtasks(suite))
    return PlannedTask(
        suite=suite,
        subtask=subtask,
        num_subtasks=num_subtasks,
        data=data,
        data_identity="hub" if local is None else local.identity(),
        num_fewshot=num_fewshot,
        settings=settings,
        sandbox=sandbox,
    )


def _evaluate(model: Any, name: str, inputs: Mapping[str, str], task: PlannedTask, *, limit: int | None) -> dict:
    """Run a model through a sub-task, and return the result to record."""
    started = time.monotonic()
    built = build_task(task.suite, task.subtask, task.data, num_fewshot=task.num_fewshot)
    scores = score(model, task.suite, built, limit=limit, as_chat=bool(task.settings.get("apply_chat_template")))
    return {
        "suite": task.suite.name,
        "subtask": task.subtask,
        "model": name,
        "model_inputs": dict(inputs),
        "data": task.data_identity,
        "settings": dict(task.settings),
        "num_subtasks": task.num_subtasks,
        "num_documents": len(next(iter(scores.values.values()))),
        "num_documents_in_data": scores.num_documents,
        "num_truncated_prompts": scores.num_truncated,
        "max_length": scores.max_length,
        "metrics": {
            metric.key: _metric(metric.label, figure([np.array(scores.values[metric.key])], metric.kind))
            for metric in task.suite.metrics
        },
        "documents": scores.values,
        "sandbox": dict(task.sandbox),
        "seconds": round(time.monotonic() - started, 1),
    }


def _metric(label: str, estimate: tuple[float, float]) -> dict[str, Any]:
    value, error = estimate
    return {"label": label, "value": value, "standard_error": None if np.isnan(error) else error}


def _line(name: str, result: Mapping[str, Any]) -> str:
    figures = ", ".join(
        f"{metric['label']} {metric['value']:.4f}"
        + ("" if metric["standard_error"] is None else f" ± {metric['standard_error']:.4f}")
        for metric in result["metrics"].values()
    )
    count, whole = result["num_documents"], result["num_documents_in_data"]
    cut = result["num_truncated_prompts"]
    return (
        f"{result['suite']}/{result['subtask']} of {name}: {figures} ({count:,} of {whole:,} documents, "
        f"{result['settings']['num_fewshot']}-shot"
        + (", chat template" if result["settings"].get("apply_chat_template") else "")
        + (f"; {cut} prompts were truncated at the beginning)" if cut else ")")
    )
