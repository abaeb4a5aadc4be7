"""Code generation as in MultiPL-E: one greedy completion per problem, then its tests in the sandbox."""

from typing import Any, Final

from pipeline.evaluation.suites.languages import LANGUAGES, execute

MAX_NEW_TOKENS: Final = 512
"""Largest number of tokens of a completion; solutions of HumanEval's problems have a few dozen lines."""

NUM_LANGUAGES: Final = 19
"""MultiPL-E's 18, and Python, from which it translates."""


def hub_dataset(language: str) -> dict[str, str]:
    """Return the arguments of ``datasets.load_dataset`` for the problems of a language."""
    if language == "py":
        return {"path": "openai/openai_humaneval"}
    return {"path": "nuprl/MultiPL-E", "name": f"humaneval-{language}"}


def task_config(language: str, stop_tokens: list[str]) -> dict[str, Any]:
    """Build the harness's task of one language, without its data.

    Args:
        language: name of the language in MultiPL-E.
        stop_tokens: texts that end a completion.
    """

    def score(doc: dict[str, Any], completions: list[str]) -> dict[str, float]:
        _, passed = execute(language, f"{doc['prompt']}{completions[0]}\n{doc['tests']}")
        return {"pass@1": float(passed)}

    return {
        "task": f"multipl_e_{language}",
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{tests}}",
        "generation_kwargs": {"until": stop_tokens, "max_gen_toks": MAX_NEW_TOKENS, "do_sample": False},
        "process_results": score,
        "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }


def languages_on_hub() -> tuple[str, ...]:
    """List the languages that are tried if no sub-task is named and the data comes from the hub."""
    return tuple(LANGUAGES)
