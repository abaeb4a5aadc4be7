"""Fixtures for tests of training: a tiny model, and fused files over its vocabulary."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.models.config import ModelConfig
from stages.models.tokenizer import SegmentTokenizer
from tests.tiny_models import save_model
from tests.tiny_tokenizers import TEXTS
from tests.train.fused_files import fused_table, save, text_blocks
from train.config import TrainConfig
from train.job import TrainJob


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("train-model")
    return ModelConfig(name="tiny", path=save_model(folder / "tiny", architecture="llama", tokenizer_family="spm-bpe"))


@pytest.fixture(scope="session")
def tiny_job(tiny_model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """11 blocks of 16 tokens in two files, 4 blocks a step, two epochs: 6 steps."""
    folder = tmp_path_factory.mktemp("train-files")
    tokenizer = SegmentTokenizer.load(tiny_model)
    ids = tokenizer.encode(TEXTS[0] + TEXTS[1], is_last=True).ids
    blocks, size = text_blocks(ids, 16, 11), tokenizer.vocabulary.size
    files = tuple(
        save(fused_table(part, size, tail="bucket", seed=seed), folder / f"shard-{seed}.parquet")
        for seed, part in enumerate((blocks[:5], blocks[5:]))
    )
    config = make_config()
    return TrainJob(config, tiny_model, files, str(folder / "unused"), "0123456789ab", ("source-one", "source-two"))


def make_config(**settings: Any) -> TrainConfig:
    defaults = {
        "lambda": 0.5,
        "batch_size": 4,
        "num_epochs": 2,
        "learning_rate": 3e-3,
        "autocast": "float32",
        "checkpoint_every_steps": 2,
        "chunk_positions": 16,
        "device": "cpu",
    }
    return TrainConfig(**{**defaults, **settings})


def job_in(job: TrainJob, output: Path, **settings: Any) -> TrainJob:
    """Return the job with another output folder and other settings."""
    return replace(job, output=str(output), config=make_config(**settings))
