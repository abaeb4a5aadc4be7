"""What the machines and the models' code decide of a plan."""

import importlib
import json
from pathlib import Path

import pytest

from pipeline.forecast.machines import EAGER_ONLY, attention_warnings, idle_gpu_warnings, is_eager_only
from pipeline.settings.load import load_config
from pipeline.settings.run import EngineConfig, RunConfig
from stages.models.config import ModelConfig


def llama(**engine: int) -> RunConfig:
    config = load_config("llama2_7b")
    return config.model_copy(update={"engine": config.engine.model_copy(update=engine)})


def test_machines_with_few_cpus_leave_gpus_idle_and_the_warning_says_which_numbers_fit() -> None:
    """16 CPUs for 8 GPUs: two training processes of 8 CPUs, four logits workers of 4."""
    logits, train = idle_gpu_warnings(llama(node_cpus=16, node_gpus=8))
    assert (
        "logits asks for 4 CPUs and 1 GPUs per worker, and a machine with 16 CPUs and 8 GPUs has room for 4" in logits
    )
    assert "4 GPUs stay idle. Set logits.cpus_per_worker to at most 2, or give each machine 32 CPUs" in logits
    assert (
        "has room for 2: 6 GPUs stay idle. Set train.cpus_per_worker to at most 2, or give each machine 64 CPUs"
        in train
    )


def test_machines_that_fit_cause_no_warning() -> None:
    assert idle_gpu_warnings(llama(node_cpus=64, node_gpus=8)) == []
    assert idle_gpu_warnings(llama()) == []
    with pytest.raises(ValueError, match="give both or neither"):
        EngineConfig(node_cpus=16)


def test_more_gpus_a_worker_than_a_machine_has_are_named() -> None:
    config = llama(node_cpus=64, node_gpus=4)
    logits = config.logits.model_copy(update={"gpus_per_worker": 8.0})
    [warning] = idle_gpu_warnings(config.model_copy(update={"logits": logits}))
    assert "a machine has 4 GPUs: no worker fits. Lower logits.gpus_per_worker" in warning


def test_only_models_without_fast_attention_cause_a_warning(tmp_path: Path) -> None:
    config = load_config("llama2_7b")
    assert [is_eager_only(model) for model in config.models] == [False, False, True]
    [warning] = attention_warnings(config)
    assert warning.startswith("mpt runs with eager attention")
    assert "its time is taken to be 1.5 times as long" in warning
    assert not is_eager_only(ModelConfig(name="unread", path=tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    assert is_eager_only(ModelConfig(name="bloom", path=tmp_path))


@pytest.mark.parametrize("kind", sorted(EAGER_ONLY))
def test_transformers_has_no_other_attention_for_them(kind: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    model = getattr(module, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    assert not model._supports_sdpa
    assert not model._supports_flash_attn
