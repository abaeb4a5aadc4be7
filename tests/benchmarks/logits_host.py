"""Benchmark of how far the logits stage's host work overlaps with a forward pass that uses no host time, as on a GPU."""

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final
from unittest import mock

import numpy as np
from rich.console import Console

from pipeline.engine import local_runner
from pipeline.engine.sharded_stage import run_stage
from pipeline.engine.worker import ShardJob
from pipeline.run.session import Run, open_run
from pipeline.run.shard_plan import read_plan
from pipeline.run.specs import Resources
from pipeline.run.stage_table import sharded_stage
from pipeline.run.steps import Request
from pipeline.settings.run import EngineConfig
from stages.logits.backends.base import Predictions
from stages.logits.stage import LogitsStage
from stages.models.windows import ContextWindow
from tests.benchmarks.figure import Figure
from tests.benchmarks.measure import ROUNDS, say
from tests.tiny_run import save_inputs
from tests.tiny_tokenizers import TEXTS

NUM_SHARDS: Final = 24
"""Number of shards. Host work before the first forward pass and after the last one cannot overlap: 1 / 24 of the total."""
DOCUMENTS_PER_SHARD: Final = 24
TOP_K: Final = 10


class SleepingBackend:
    """Backend without a model, which returns rows of the right shape; see ``stages.logits.backends.base.Backend``."""

    max_length = 2048
    versions: Mapping[str, str] = {"backend": "asleep"}

    def __init__(self, num_ids: int, forward_seconds: float) -> None:
        """Set the duration of a shard's forward pass, which includes generating its numbers."""
        self.num_embeddings = num_ids
        self._forward_seconds = forward_seconds
        self.busy_seconds = 0.0

    def predict(
        self,
        sequences: Sequence[np.ndarray],
        cuts: Sequence[Sequence[ContextWindow]],
        uniforms: np.ndarray | None = None,
    ) -> Predictions:
        """Sleep, and return different numbers for every position, so that files compress like real ones."""
        del cuts, uniforms
        started = time.perf_counter()
        predictions = Predictions.empty([len(sequence) for sequence in sequences], width=TOP_K)
        random = np.random.default_rng(0)
        shape = predictions.topk_ids.shape
        predictions.topk_ids[:] = random.integers(self.num_embeddings, size=shape)
        logits = np.sort(random.normal(scale=3, size=shape), axis=1)[:, ::-1]
        predictions.topk_logprobs[:] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) - 0.1
        predictions.gold_logprob[:] = predictions.topk_logprobs[:, 0]
        predictions.gold_logprob[predictions.starts[1:] - 1] = np.nan
        self.busy_seconds += time.perf_counter() - started
        time.sleep(max(0.0, self._forward_seconds - (time.perf_counter() - started)))
        return predictions


def host_overlap() -> list[Figure]:
    """Measure a stage's time over that of its forward passes, which are as long as its host work: 2 without any overlap."""
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        run = _cut_shards(Path(folder))
        for number in range(ROUNDS + 1):
            alone, made_up = _stage_seconds(run, f"host-{number}", 0.0, shards_per_worker=1)
            host_seconds = (alone - made_up) / NUM_SHARDS
            together = sharded_stage("logits").shards_per_worker
            seconds, _ = _stage_seconds(run, f"both-{number}", host_seconds, shards_per_worker=together)
            if number:  # the first round loads tokenizers and fills the disk cache
                ratios.append(seconds / (host_seconds * NUM_SHARDS))
                say(f"{NUM_SHARDS} shards of {host_seconds:.2f} s host and forward each: {seconds:.2f} s")
    return [Figure("logits.host_overlap", statistics.median(ratios), "times the forward time", "<= 1.15")]


def _cut_shards(folder: Path) -> Run:
    config = save_inputs(folder)
    texts = [" ".join(TEXTS[number % len(TEXTS) :] * 2) for number in range(NUM_SHARDS * DOCUMENTS_PER_SHARD)]
    lines = [json.dumps({"text": f"{number}: {text}"}) + "\n" for number, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("".join(lines))
    settings = (
        "shard.max_length=2048",
        "logits.max_length=2048",
        "fuse.max_length=2048",
        "shard.validation_fraction=0.0",
        f"shard.documents_per_shard={DOCUMENTS_PER_SHARD}",
    )
    run = open_run(Request(str(config), settings), str(folder / "run"), Console(quiet=True), local=True)
    run_stage(run, "shard")
    return run


def _stage_seconds(run: Run, launch: str, forward_seconds: float, *, shards_per_worker: int) -> tuple[float, float]:
    """Compute one model's shards again; return the seconds of the stage, and those spent on generating numbers."""
    step, shard = run.resolved.steps["logits/llama"], run.resolved.steps["shard"]
    plan = read_plan(run.store, shard.folder)
    assert plan is not None
    assert plan.num_shards == NUM_SHARDS
    for name in run.store.manifest_names(step.folder):
        run.store.delete(f"{step.folder}/manifests/{name}")
    job = ShardJob(
        run_url=run.store.url,
        config_json=run.config.model_dump_json(by_alias=True),
        step=step,
        input_folders={"shard": shard.folder},
        shard_folder=shard.folder,
        num_shards=NUM_SHARDS,
        launch=launch,
        max_attempts=1,
    )
    resources = Resources(1, 1, 0, models=True, shards_per_worker=shards_per_worker)

    backends: list[SleepingBackend] = []

    def backend(stage: LogitsStage) -> SleepingBackend:
        backends.append(SleepingBackend(stage._tokenizer.vocabulary.size, forward_seconds))
        return backends[-1]

    with mock.patch.object(LogitsStage, "_load_backend", backend):
        started = time.perf_counter()
        outcomes = [
            status.outcome for status in local_runner.run_shards(job, range(NUM_SHARDS), resources, EngineConfig())
        ]
        seconds = time.perf_counter() - started
    assert outcomes == ["done"] * NUM_SHARDS
    return seconds, sum(made.busy_seconds for made in backends)
