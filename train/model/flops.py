"""Floating-point operations of training, and their share of a GPU's peak (MFU)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from train.config import TrainConfig

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10": 125.0,
}
"""Dense bf16 peak by a part of the device's name, as NVIDIA's data sheets give it; the first that fits counts."""


@dataclass(frozen=True)
class ModelFlops:
    """Operations per token in the forward and backward pass, without recomputation, as counted in PaLM's appendix B.

    Six operations per weight that is multiplied with (two forward, two for the gradient of its input, two for its own,
    which a frozen weight goes without), and 12 * layers * width * length for attention, causality not counted.

    Attributes:
        per_token: operations per token for the weights.
        per_token_and_length: operations per token for attention, divided by the number of tokens in the block.
    """

    per_token: float
    per_token_and_length: float

    @classmethod
    def of(cls, model: Any) -> "ModelFlops | None":
        """Count a transformers causal language model, sharded or not.

        Weights of embeddings are looked up, not multiplied with; the LM head's are, tied or not.

        Returns:
            None for a model whose configuration has no attention heads: its other operations are not known here.
        """
        config = model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", None)
        if not isinstance(heads, int):
            return None
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        embeddings.discard(id(model.get_output_embeddings().weight))
        multiplied = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in embeddings]
        trained = sum(p.numel() for p in multiplied if p.requires_grad)
        frozen = sum(p.numel() for p in multiplied) - trained
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        return cls(6.0 * trained + 4.0 * frozen, 12.0 * config.num_hidden_layers * width)

    def of_tokens(self, num_tokens: int, num_blocks: int) -> float:
        """Return the operations of some tokens in blocks of about equal length."""
        return num_tokens * (self.per_token + self.per_token_and_length * num_tokens / max(1, num_blocks))


def peak_flops(config: TrainConfig, device: torch.device) -> float | None:
    """Return the peak operations per second of one worker's device; None if unknown (a CPU, for example)."""
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    if device.type != "cuda" or config.autocast != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for gpu, tflops in PEAK_TFLOPS.items() if gpu in name), None)
