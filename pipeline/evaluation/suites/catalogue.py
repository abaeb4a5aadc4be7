"""Catalogue of suites: their tasks in the harness, their number of examples, and their metrics."""

from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True)
class Metric:
    """Metric of a suite.

    Attributes:
        key: name in the harness: the metric, a comma, and the filter of the answer.
        label: name for people.
        kind: ``mean`` of the documents' values, or ``perplexity``, exp(-mean) of their log-likelihoods.
    """

    key: str
    label: str
    kind: Literal["mean", "perplexity"] = "mean"


@dataclass(frozen=True)
class Suite:
    """A benchmark.

    Attributes:
        name: name in the configuration.
        folder: folder of the harness's task files, below ``lm_eval/tasks``; None for a task that is defined here.
        prefix: prefix of the harness's task names; what follows names the sub-task. Empty where the suite is one task.
        tasks: the harness's names where they are not all that begin with ``prefix``.
        num_fewshot: examples before each question.
        fewshot_from: origin of the examples: the harness's task file, or a split of the data.
        metrics: the headline figure first.
    """

    name: str
    folder: str | None
    prefix: str
    num_fewshot: int
    metrics: tuple[Metric, ...]
    tasks: tuple[str, ...] = ()
    fewshot_from: Literal["harness", "dev split"] = "harness"


SUITES: Final = {
    suite.name: suite
    for suite in (
        Suite(
            "gsm8k",
            folder="gsm8k",
            prefix="",
            tasks=("gsm8k_cot",),
            num_fewshot=8,
            metrics=(
                Metric("exact_match,strict-match", "exact match (strict)"),
                Metric("exact_match,flexible-extract", "exact match (flexible)"),
            ),
        ),
        Suite(
            "bbh",
            folder="bbh/cot_fewshot",
            prefix="bbh_cot_fewshot_",
            num_fewshot=3,
            metrics=(Metric("exact_match,get-answer", "exact match"),),
        ),
        Suite("multipl-e", folder=None, prefix="", num_fewshot=0, metrics=(Metric("pass@1,none", "pass@1"),)),
        Suite(
            "mmlu",
            folder="mmlu/default",
            prefix="mmlu_",
            num_fewshot=5,
            fewshot_from="dev split",
            metrics=(Metric("acc,none", "accuracy"),),
        ),
        Suite(
            "toxigen",
            folder="toxigen",
            prefix="",
            tasks=("toxigen",),
            num_fewshot=0,
            metrics=(Metric("acc,none", "accuracy"),),
        ),
        Suite(
            "tydiqa",
            folder="tydiqa",
            prefix="tydiqa_goldp_",
            num_fewshot=0,
            metrics=(Metric("f1,none", "F1"), Metric("exact_match,none", "exact match")),
        ),
        Suite(
            "lambada",
            folder="lambada",
            prefix="",
            tasks=("lambada_openai",),
            num_fewshot=0,
            metrics=(Metric("acc,none", "accuracy"), Metric("perplexity,none", "perplexity", "perplexity")),
        ),
    )
}
"""Few-shot counts are the harness's own; those of the paper are not known to us (docs/evaluation.md)."""


def selected(names: tuple[str, ...]) -> dict[str, tuple[str, ...] | None]:
    """Map each selected suite to its selected sub-tasks (None: all), in the configuration's order.

    Args:
        names: entries of ``[eval] suites``: ``"bbh"`` selects the whole suite, ``"bbh/navigate"`` one sub-task.
    """
    subtasks: dict[str, tuple[str, ...] | None] = {}
    for name in names:
        suite, slash, subtask = name.partition("/")
        before = subtasks.get(suite, ())
        subtasks[suite] = None if not slash or before is None else tuple(dict.fromkeys((*before, subtask)))
    return subtasks
