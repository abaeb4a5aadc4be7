"""Interface to lm-evaluation-harness, which only this module imports: its tasks on our data, and scoring."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from pipeline.evaluation.suites.catalogue import Suite
from pipeline.evaluation.suites.local_data import Document, as_multipl_e
from pipeline.evaluation.suites.multipl_e import hub_dataset, task_config
from stages.models.config import ModelConfig, load_model, load_tokenizer
from stages.models.tokenizer import SegmentTokenizer
from train.config import EvalConfig

Data = Mapping[str, list[Document]]


class HarnessMissingError(ImportError):
    """lm-evaluation-harness is not installed; the message says how to install it."""


def harness_version() -> str:
    """Return the installed version of the harness.

    Raises:
        HarnessMissingError: it is not installed.
    """
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise HarnessMissingError(
            "[eval] suites need lm-evaluation-harness, which is not installed: run `make eval SUITES='...'`, or `pip "
            "install --requirement requirements-eval.txt` (`pip install 'ptafuse[eval]'`)"
        ) from None


def harness_subtasks(suite: Suite) -> tuple[str, ...]:
    """List every sub-task of a suite that the harness defines."""
    if suite.tasks:
        return tuple(name.removeprefix(suite.prefix) for name in suite.tasks)
    names = [name for name in _manager(suite).all_subtasks if name.startswith(suite.prefix)]
    return tuple(name.removeprefix(suite.prefix) for name in names)


def build_task(suite: Suite, subtask: str, data: Data | None, *, num_fewshot: int) -> Any:
    """Build the harness's task.

    Args:
        suite: which suite.
        subtask: which of its sub-tasks.
        data: split -> documents; None to take the harness's own data set from the hub.
        num_fewshot: examples before each question.
    """
    if suite.folder is None:
        task = _code_task(subtask, data)
    elif data is None:
        task = _manager(suite).load([suite.prefix + subtask])["tasks"][suite.prefix + subtask]
    else:
        changed = {
            "task": suite.prefix + subtask,
            "custom_dataset": _in_memory(data),
            "process_docs": None,  # ours are as it would leave them
            "training_split": None,
            "fewshot_split": "dev" if num_fewshot and suite.fewshot_from == "dev split" else None,
        }
        task = _manager(suite).load([{"group": suite.name, "task": [changed]}])["tasks"][suite.prefix + subtask]
    task.set_config(key="num_fewshot", value=num_fewshot)
    return task


def load_harness_model(model: ModelConfig, config: EvalConfig, *, cpus: float) -> Any:
    """Load a model for the harness: our weights, precision, device and attention; logprobs in float32."""
    from lm_eval.models.huggingface import HFLM

    from stages.models.devices import attention_choices, resolve_device, set_threads

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # prompts that were cut are counted in the result
    device = resolve_device(config.device)
    set_threads(device, cpus)
    attention = attention_choices(config.attention, device, half_precision=config.dtype == "bfloat16")
    loaded = load_model(model, dtype=config.dtype, attention=attention, device=str(device))
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = chat_template(model)
    return HFLM(
        pretrained=loaded,
        tokenizer=tokenizer,
        backend="causal",
        add_bos_token=model.bos,
        batch_size=config.suite_batch_size,
        softmax_dtype="float32",
        trust_remote_code=model.trust_remote_code,
    )


def chat_template(model: ModelConfig) -> str | None:
    """Return the chat template that a model's questions are asked under; None if it has none."""
    if model.chat_template is not None:
        return SegmentTokenizer.load(model).chat_template
    template: str | None = load_tokenizer(model).chat_template
    return template


@dataclass(frozen=True)
class Scores:
    """Scores of a model in one sub-task.

    Attributes:
        values: metric's key -> each document's value, in the order of the data.
        num_documents: number of documents in the data; ``limit`` may have left some out.
        num_truncated: documents whose prompt was longer than the model's window and lost its beginning.
        max_length: the model's window, tokens.
    """

    values: dict[str, list[float]]
    num_documents: int
    num_truncated: int
    max_length: int


def score(model: Any, suite: Suite, task: Any, *, limit: int | None, as_chat: bool = False) -> Scores:
    """Run a model through a sub-task.

    Args:
        model: result of ``load_harness_model``.
        suite: names the metrics.
        task: result of ``build_task``.
        limit: documents, the first ones; all of them by default.
        as_chat: the question is a turn of the user, under the model's chat template, and so is each example before it.

    Raises:
        FloatingPointError: a document's value is not finite; names it.
    """
    from lm_eval.evaluator import evaluate

    name = task.task_name
    results = evaluate(
        model,
        {"tasks": {name: task}},
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=as_chat,
        fewshot_as_multiturn=as_chat,
    )
    samples = results["samples"][name]
    values = {}
    for metric in suite.metrics:
        key, _, filter_name = metric.key.rpartition(",")
        values[metric.key] = [float(sample[key]) for sample in samples if sample["filter"] == filter_name]
        for number, value in enumerate(values[metric.key]):
            if not math.isfinite(value):
                raise FloatingPointError(f"{name}: {metric.label} of document {number} is {value}")
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    return Scores(
        values,
        len(task.eval_docs),
        sum(_is_truncated(model, sample["arguments"]) for sample in first),
        model.max_length,
    )


def _is_truncated(model: Any, requests: list[tuple]) -> bool:
    """Return whether a prompt of a document is longer than what the model can read of it."""
    for prompt, rest in requests:
        is_answer = isinstance(rest, str)
        text = prompt + rest if is_answer else prompt
        # of an answer the last token is predicted, never read
        room = model.max_length + 1 if is_answer else model.max_length - rest.get("max_gen_toks", model.max_gen_toks)
        if len(text.encode()) > room - NUM_SPECIAL and len(model.tok_encode(text)) > room:
            return True
    return False


NUM_SPECIAL: Final = 8
"""Tokens that a tokenizer may add; every other token has a byte at least, so a text of few bytes fits."""


def _manager(suite: Suite) -> Any:
    """Build an index of the suite's task files only; the harness has many thousands."""
    import lm_eval.tasks

    assert suite.folder is not None
    root = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(root / suite.folder))


def _code_task(language: str, data: Data | None) -> Any:
    from lm_eval.api.task import ConfigurableTask

    if data is None:
        data = {"test": _problems_from_hub(language)}
    config = task_config(language, list(data["test"][0]["stop_tokens"]))
    return ConfigurableTask(config={**config, "custom_dataset": _in_memory(data)})


def _problems_from_hub(language: str) -> list[Document]:
    from datasets import load_dataset

    rows = [dict(row) for row in load_dataset(**hub_dataset(language), split="test")]
    return [as_multipl_e(row) for row in rows] if language == "py" else rows


def _in_memory(data: Data) -> Callable[..., Any]:
    """Return the function that the harness calls for its data: nothing is fetched from the hub or cached on disk."""
    from datasets import Dataset, DatasetDict

    def splits(**_: Any) -> Any:
        return DatasetDict({split: Dataset.from_list(documents) for split, documents in data.items()})

    return splits
