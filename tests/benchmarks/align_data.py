"""Real inputs for the align benchmarks: tokenizers and text from ``PTAFUSE_DATA``, distributions from ``PTAFUSE_RUN``."""

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.settings.adapt import SourceConfig
from stages.align.config import AlignConfig
from stages.align.costs.edit_distance import EditDistanceCosts
from stages.align.stage import AlignStage
from stages.contract.manifest import DataFile
from stages.contract.store import Store
from stages.models.config import ModelConfig
from stages.models.tokenizer import SegmentTokenizer
from tests.benchmarks.measure import SkippedError

TARGET, SOURCE = "smollm2", "gemma3"
TOP_K = 10


def data_folder() -> Path:
    """Return the folder of reference data.

    Raises:
        SkippedError: ``PTAFUSE_DATA`` is not set.
    """
    folder = os.environ.get("PTAFUSE_DATA")
    if not folder:
        raise SkippedError("set PTAFUSE_DATA to a folder with tokenizers/{llama2,mpt-7b,qwen3} and text/mixed.jsonl")
    return Path(folder)


@cache
def tokenizer(name: str) -> SegmentTokenizer:
    """Return one of ``PTAFUSE_DATA``'s tokenizers."""
    return SegmentTokenizer.load(ModelConfig(name=name, path=data_folder() / "tokenizers" / name))


def text_of_tokens(num_tokens: int) -> str:
    """Return the first ``num_tokens`` Llama-2 tokens, including special ones, of the longest document."""
    lines = (data_folder() / "text" / "mixed.jsonl").read_text(encoding="utf-8").splitlines()
    text = max((json.loads(line)["text"] for line in lines), key=len)
    end = tokenizer("llama2").encode(text, is_last=True).byte_end[num_tokens - 2]
    return text.encode()[:end].decode(errors="ignore")


def run_folder() -> Path:
    """Return a finished demo run.

    Raises:
        SkippedError: the folder has no logits of the demo's models.
    """
    folder = Path(os.environ.get("PTAFUSE_RUN") or "runs/demo")
    for name in (TARGET, SOURCE):
        if not (folder / "logits" / name).is_dir():
            raise SkippedError(f"{folder} has no logits/{name}: `make demo` first, or set PTAFUSE_RUN to a demo run")
    return folder


def logits_files(name: str) -> dict[int, DataFile]:
    """Return the committed logits of one of the run's models, by shard."""
    store = Store(str(run_folder()))
    found = [store.manifests(f"logits/{name}/{fingerprint}") for fingerprint in store.names(f"logits/{name}")]
    return {shard: manifest.data for shard, manifest in sorted(max(found, key=len, default={}).items())}


def shards() -> list[tuple[DataFile, DataFile]]:
    """Return the run's shards: the target's file and the source's."""
    target, source = logits_files(TARGET), logits_files(SOURCE)
    return [(target[shard], source[shard]) for shard in target if shard in source]


def read(data: DataFile) -> pa.Table:
    """Return a table of the run."""
    return Store(str(run_folder())).read_table(data, remake="make demo")


def models() -> tuple[ModelConfig, ModelConfig]:
    """Return the run's two models."""
    configs = sorted((run_folder() / "configs").glob("*.json"), key=lambda path: path.stat().st_mtime)
    config = json.loads(configs[-1].read_text())["config"]
    found = {model["name"]: model for model in (config["target"], *config["sources"])}
    return ModelConfig.model_validate(found[TARGET]), SourceConfig.model_validate(found[SOURCE])


def stage(preset: str, **chosen: str) -> AlignStage:
    """Return the align stage of the run's models after ``setup()``; ``chosen`` has further settings."""
    made = AlignStage(AlignConfig.model_validate({"preset": preset, "top_k": TOP_K, **chosen}), *models())
    made.setup()
    return made


@cache
def problems() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the run's transport problems at shared boundaries: cost (P, 10, 10), a and b (P, 10)."""
    target, source = (SegmentTokenizer.load(model) for model in models())
    distances = EditDistanceCosts(
        [source.vocabulary.text(token) for token in range(source.vocabulary.size)],
        [target.vocabulary.text(token) for token in range(target.vocabulary.size)],
    )
    parts = [_shared_boundaries(*(read(data).to_pylist() for data in pair)) for pair in shards()]
    source_ids, a, target_ids, b = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return distances.costs(source_ids, target_ids), a, b


def _shared_boundaries(target_rows: list[dict], source_rows: list[dict]) -> tuple[np.ndarray, ...]:
    ids: tuple[list, list] = ([], [])
    probs: tuple[list, list] = ([], [])
    by_key = {(row["doc_id"], row["segment"]): row for row in source_rows}
    for target in target_rows:
        source = by_key.get((target["doc_id"], target["segment"]))
        if source is None:
            continue
        at = {end: k for k, end in enumerate(source["byte_end"])}
        for j, end in enumerate(target["byte_end"][:-1]):
            if end not in at:
                continue
            sides = ((source, at[end]), (target, j))
            if any(len(row["topk_ids"][place]) < TOP_K for row, place in sides):
                continue
            for side, (row, place) in enumerate(sides):
                weights = np.exp(row["topk_logprobs"][place][:TOP_K])
                ids[side].append(row["topk_ids"][place][:TOP_K])
                probs[side].append(weights / weights.sum())
    return np.array(ids[0]), np.array(probs[0]), np.array(ids[1]), np.array(probs[1])
