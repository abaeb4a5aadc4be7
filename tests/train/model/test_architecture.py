import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.models.heads import split_head
from train.config import LoraConfig, TrainConfig
from train.model.architecture import SavedTensors, architecture, saved_bytes
from train.model.estimate import estimate_memory
from train.model.lora import add_adapters
from train.optimizer import build_optimizer

T = 64


def tiny_config(architecture_name: str = "llama", **extra):
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4}
    if architecture_name == "gemma3_text":
        sizes |= {"head_dim": 8, "num_key_value_heads": 1, "sliding_window": 16}
    return AutoConfig.for_model(architecture_name, vocab_size=101, max_position_embeddings=256, **sizes, **extra)


def real_model(config, lora: LoraConfig | None = None, dtype: torch.dtype = torch.float32):
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    return model if lora is None else add_adapters(model, lora).to(dtype)


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4)])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox"])
def test_parameters_gradients_and_moments_are_counted_exactly(name, tied, lora):
    config = tiny_config(name, tie_word_embeddings=tied)
    found = architecture(config, block_tokens=T, half_precision=False, lora=lora)
    model = real_model(config, lora)
    assert found.num_parameters == sum(p.numel() for p in model.parameters())
    assert found.num_trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.num_layers == 4
    assert found.num_parameters == 4 * found.layer_parameters + found.outside_parameters
    assert found.num_trained == 4 * found.num_trained_in_layer + found.num_trained_outside
    optimizer = build_optimizer(model, TrainConfig())
    model(input_ids=torch.zeros(1, 8, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    memory = estimate_memory(found, TrainConfig(num_workers=1, lora=lora), block_tokens=T)
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert memory.optimizer == sum(value.nbytes for value in moments)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox"])
def test_saved_bytes_are_those_of_a_real_forward_pass_and_masks(name, dtype, recompute):
    config = tiny_config(name)
    found = saved_bytes(config, 4, T, dtype, None, recompute=recompute)
    model = real_model(config, dtype=dtype)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    body, _ = split_head(model)
    counted = SavedTensors(model)
    with counted.hooks():
        body(torch.zeros((1, T), dtype=torch.int64))
    masks = 4 * T * T * dtype.itemsize  # a real pass without isolation needs none
    assert counted.num_bytes <= found <= counted.num_bytes + masks
    extrapolated = architecture(config, block_tokens=T, half_precision=dtype == torch.bfloat16, lora=None).saved
    layer = extrapolated.layer_recomputed if recompute else extrapolated.layer
    assert 4 * layer <= found <= 4 * layer + extrapolated.outside_layers


_PEAK = """
import re
import torch
from pathlib import Path
from tests.train.model.test_architecture import peak_config, real_model
from stages.models.heads import split_head
torch.set_num_threads(1)
model = real_model(peak_config())
body, _ = split_head(model)
body(torch.zeros((1, 8), dtype=torch.int64)).sum().backward()
def memory(name):  # getrusage would give the test process's own peak, from which this one was forked
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = memory("VmRSS")
body(torch.zeros((1, 1024), dtype=torch.int64)).sum().backward()
print(memory("VmHWM") - before)
"""


def peak_config():
    return AutoConfig.for_model(
        "llama", vocab_size=101, hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=4
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
def test_activations_are_within_a_third_of_a_measured_peak():
    """What the estimate leaves out, temporary tensors of single operations, is less than a third of the peak."""
    done = subprocess.run([sys.executable, "-c", _PEAK], check=True, capture_output=True, text=True)
    measured = int(done.stdout)
    found = architecture(peak_config(), block_tokens=1024, half_precision=False, lora=None)
    estimated = estimate_memory(found, TrainConfig(autocast="float32"), block_tokens=1024).activations
    assert measured / 1.5 < estimated < measured * 1.5
