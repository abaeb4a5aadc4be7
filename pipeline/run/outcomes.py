"""Results of train and eval in the run directory."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.run.steps import Step, result_key
from stages.contract.store import Store


def read_training_log(step: Step, store: Store) -> list[dict[str, Any]]:
    """Read the records of the train step so far (``train.job.StepRecord``), without a half-written line."""
    try:
        lines = store.read(f"{step.folder}/log.jsonl").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def training_seconds(records: Sequence[Mapping[str, Any]]) -> tuple[float, int]:
    """Sum the seconds in optimizer steps and the tokens, from the records of the step log."""
    seconds, before = 0.0, 0
    for record in records:
        seconds += (record["num_tokens"] - before) / record["tokens_per_second"]
        before = record["num_tokens"]
    return seconds, before


def read_rounding(step: Step, store: Store) -> dict[str, int] | None:
    """Return how many weights training changed, and how many changes survive bfloat16 (``train.model.rounding``).

    None where training is not done, or has recorded nothing of it.
    """
    try:
        return json.loads(store.read(result_key(step))).get("bfloat16")
    except FileNotFoundError:
        return None


def read_result(store: Store, step: Step) -> dict[str, Any] | None:
    """Read the result of one model; None if it was not evaluated.

    A baseline that these models do not allow has ``refused``, the reason, instead of results.
    """
    try:
        return json.loads(store.read(result_key(step)))
    except FileNotFoundError:
        return None


def evaluation_dtype(result: Mapping[str, Any]) -> str:
    """Return the precision in which a model's figures were computed."""
    return result["settings"]["eval"]["dtype"]


def count_endings(result: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return how many answers to held-out prompts a model ended by itself, and how many it gave.

    None where it was not asked (``eval.num_generations``).
    """
    answers = result.get("answers")
    return None if answers is None else (sum(answer["is_ended"] for answer in answers), len(answers))
