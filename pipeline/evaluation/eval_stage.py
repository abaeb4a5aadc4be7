"""Eval stage: bits per byte of the target before training, of each source, of baselines, and of the trained model.

Each figure is kept under the fingerprint of the model and the text that it speaks of, so that runs which share them
share it.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.evaluation.card import complete_card
from pipeline.evaluation.texts.describe import describe_counts
from pipeline.evaluation.texts.prepare import prepare_texts
from pipeline.run.outcomes import count_endings
from pipeline.run.session import Run, StageError, command, require_complete
from pipeline.run.stage_table import FUSED
from pipeline.run.steps import Step, result_key
from pipeline.run.trained_model import evaluated_model, is_trained, local_folder
from pipeline.settings.baselines import ENSEMBLE, WEIGHT_AVERAGE, AverageRefusedError
from stages.models.segment_text import segment_texts
from train.evaluate import Evaluation, Segment, bits_per_byte

log = logging.getLogger(__name__)


def run_eval(run: Run, call: Callable[..., Iterator[Any]]) -> None:
    """Evaluate every model of the run that has no figure yet: on the held-out split that ``eval.split`` names, and on texts.

    Texts are prepared before any model is loaded: one that cannot be used ends the command early.

    Args:
        run: the run.
        call: runs work that loads a model, see ``engine.model_task.run_with_model``; called with the run, the name of the
            work, the work, and its arguments.

    Raises:
        StageError: the shard stage is incomplete, no document is held out, a text cannot be used, or, after all other models
            were evaluated, the target is not trained yet.
    """
    num_shards = require_complete(run, ["shard"], "eval")
    pending = [step for step in run.resolved.of_stage("eval") if not run.store.exists(result_key(step))]
    trained = is_trained(run)
    if not pending:
        if trained:  # a sweep keeps the figures of the models that it removes
            complete_card(run)
        run.console.print("eval: nothing to do (every model is evaluated)")
        return
    possible = [step for step in pending if step.model != FUSED or trained]
    texts = prepare_texts(run, list(dict.fromkeys(step.text for step in possible if step.text)), num_shards)
    for name, prepared in texts.items():
        shown = describe_counts(prepared.counts)
        run.console.print(f"text {name}: {shown}", soft_wrap=True, markup=False, highlight=False)
    held_out = held_out_segments(run, num_shards) if any(step.text is None for step in possible) else []
    for step in possible:
        started = time.monotonic()
        text = None if step.text is None else texts[step.text]
        segments, kinds = (held_out, {}) if text is None else (list(text.segments), dict(text.kinds))
        (figures,) = call(run, step.key, _compute_figures, step, segments, kinds)
        if "refused" in figures:
            shown = f"refused: {figures['refused']}"
        else:
            where = "held-out bytes" if text is None else f"bytes of {step.text}"
            shown = f"{figures['bits_per_byte']:.4f} bits per byte on {figures['num_bytes']:,} {where}"
            endings = count_endings(figures)
            if endings is not None:
                shown += f"; {endings[0]} of {endings[1]} answers end by themselves"
        seconds = round(time.monotonic() - started, 1)
        of_text = {} if text is None else {"text": step.text, "counts": dict(text.counts)}
        value = {"model": step.model, **of_text, **figures, "seconds": seconds, "settings": dict(step.settings)}
        run.store.create(result_key(step), (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())
        run.console.print(f"{step.key}: {shown}", soft_wrap=True)
    if trained:
        complete_card(run)
    elif any(step.model == FUSED for step in pending):
        raise StageError(
            f"the trained model is not evaluated, because train is not complete: run {command(run, 'train')}"
        )


def check_texts(run: Run) -> None:
    """Refuse a text that could not be evaluated, before anything is trained.

    Texts that a model has been evaluated on are known to be usable.

    Raises:
        StageError: the shard stage is incomplete, or a text cannot be used.
    """
    num_shards = require_complete(run, ["shard"], "eval")
    evaluated = {step.text for step in run.resolved.of_stage("eval") if run.store.exists(result_key(step))}
    prepare_texts(run, [text.name for text in run.config.eval.texts if text.name not in evaluated], num_shards)


def _compute_figures(
    run: Run, step: Step, segments: Sequence[Segment], kinds: Mapping[int, str]
) -> Iterator[dict[str, Any]]:
    """Yield a step's figures, once; the reason in their place where the models' weights cannot be averaged."""
    try:
        evaluation, notes = _evaluate(run, step, list(segments))
    except AverageRefusedError as error:
        yield {"refused": str(error)}
    else:
        yield {**_figures(evaluation, kinds), **notes}


def _evaluate(run: Run, step: Step, segments: list[Segment]) -> tuple[Evaluation, dict[str, Any]]:
    """Evaluate one step; return the evaluation, and other values to record.

    Raises:
        AverageRefusedError: the models' weights cannot be averaged.
    """
    config = run.config
    if step.text is not None:  # its documents are chosen already
        config = config.model_copy(
            update={"eval": config.eval.model_copy(update={"max_documents": None, "num_generations": 0})}
        )
    cpus = max(1, int(config.eval_cpus))
    if step.model == ENSEMBLE:
        # Imports compilers, which the reports that read results do without.
        from pipeline.evaluation.ensemble import evaluate_ensemble

        return evaluate_ensemble(config, segments, cpus=cpus)
    if step.model != WEIGHT_AVERAGE:
        return bits_per_byte(evaluated_model(run, step), segments, config.eval, cpus=cpus), {}
    from pipeline.evaluation.weight_average import average_weights

    weights = config.baselines.source_weights(WEIGHT_AVERAGE, len(config.sources))
    folder = local_folder(run, step) / "model"
    try:
        model = average_weights(config.models, (1 - sum(weights), *weights), folder)
        return bits_per_byte(model, segments, config.eval, cpus=cpus), {}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _figures(evaluation: Evaluation, kinds: Mapping[int, str]) -> dict[str, Any]:
    total = evaluation.total
    return {
        "bits_per_byte": total.bits_per_byte,
        "nats_per_token": total.nats_per_token,
        "num_tokens": total.num_tokens,
        "num_bytes": total.num_bytes,
        "documents": [
            {
                "doc_id": doc_id,
                **({"kind": kinds[doc_id]} if doc_id in kinds else {}),
                "bits_per_byte": cross_entropy.bits_per_byte,
                "num_bytes": cross_entropy.num_bytes,
            }
            for doc_id, cross_entropy in evaluation.documents
            if cross_entropy.num_bytes  # a document of one token under a model without BOS has nothing to predict
        ],
        **({} if evaluation.answers is None else {"answers": [asdict(answer) for answer in evaluation.answers]}),
    }


def held_out_segments(run: Run, num_shards: int) -> list[Segment]:
    """Read the segments of the split that ``eval.split`` names, in the order of the documents.

    Raises:
        StageError: no document is held out.
    """
    split, step = run.config.eval.split, run.resolved.steps["shard"]
    manifests = run.store.manifests(step.folder)
    tables = [run.store.read_table(manifests[shard].data, remake="`make shard`") for shard in range(num_shards)]
    rows = pa.concat_tables([table.filter(pc.equal(table["split"], split)) for table in tables])
    if not rows.num_rows:
        fraction = run.config.shard.fraction_of(split)
        raise StageError(
            f"no document is held out: shard.{split}_fraction = {fraction} of few documents: raise it, then run "
            f"{command(run, 'shard')} and the stages after it"
        )
    return [
        Segment(doc_id, segment.text, segment.is_last, messages=segment.messages)
        for doc_id, segment in zip(rows["doc_id"].to_pylist(), segment_texts(rows), strict=True)
    ]
