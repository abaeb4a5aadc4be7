"""Resource needs of a model, from only its configuration: no weights are loaded and nothing is computed.

Parameters are counted on the meta device. What the forward pass saves for the backward pass is counted by running the
model's own code on one block with fake tensors (shapes without values), for one and for two layers: the difference is
what each layer saves, whatever the architecture.
"""

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stages.models.heads import split_head
from train.config import LoraConfig
from train.model.lora import add_adapters


@dataclass(frozen=True)
class Saved:
    """Bytes that the forward pass of one block saves for the backward pass.

    Attributes:
        outside_layers: embeddings, final norm, mask.
        layer: bytes saved by each decoder layer.
        layer_recomputed: bytes saved by each decoder layer if activations are recomputed: its input.
    """

    outside_layers: int
    layer: int
    layer_recomputed: int


@dataclass(frozen=True)
class Architecture:
    """Properties of a model that memory and time depend on.

    Attributes:
        num_parameters: all weights, a shared one once.
        num_trained: those that are trained; fewer with adapters.
        num_layers: decoder layers.
        layer_parameters: weights of a layer, the largest.
        outside_parameters: weights outside the layers: embeddings, final norm, LM head.
        hidden_size: width of the states that the head reads.
        vocab_size: rows of the head.
        num_trained_in_layer, num_trained_outside: trained weights in the largest layer, and outside the layers.
        saved: activations of one block.
    """

    num_parameters: int
    num_trained: int
    num_layers: int
    layer_parameters: int
    outside_parameters: int
    num_trained_in_layer: int
    num_trained_outside: int
    hidden_size: int
    vocab_size: int
    saved: Saved


def decoder_layers(model: Any) -> list[nn.Module]:
    """Return the repeated layers: the module list as long as the model has hidden layers; empty if there is none."""
    count = model.config.get_text_config().num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next((list(layers) for layers in lists if len(layers) == count), [])


def architecture(config: Any, *, block_tokens: int, half_precision: bool, lora: LoraConfig | None) -> Architecture:
    """Count what a model of this configuration needs.

    Args:
        config: a transformers configuration of a causal language model.
        block_tokens: tokens of a training block.
        half_precision: the forward pass runs in bfloat16.
        lora: adapters, if only these are trained.

    Raises:
        ValueError: the architecture has no list of decoder layers.
    """
    model = _build(config, torch.float32, lora)
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers: its memory cannot be estimated")
    largest = max(layers, key=_count)
    trained = sum(_count(layer, trained_only=True) for layer in layers)
    num_trained = _count(model, trained_only=True)
    dtype = torch.bfloat16 if half_precision else torch.float32
    return Architecture(
        num_parameters=_count(model),
        num_trained=num_trained,
        num_layers=len(layers),
        layer_parameters=_count(largest),
        outside_parameters=_count(model) - sum(map(_count, layers)),
        num_trained_in_layer=_count(largest, trained_only=True),
        num_trained_outside=num_trained - trained,
        hidden_size=int(config.get_text_config().hidden_size),
        vocab_size=int(model.get_output_embeddings().weight.shape[0]),
        saved=_saved(config, block_tokens, dtype, lora),
    )


def _count(module: nn.Module, *, trained_only: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)


def _build(config: Any, dtype: torch.dtype, lora: LoraConfig | None) -> Any:
    """Build the model on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        return model if lora is None else add_adapters(model, lora)


def _saved(config: Any, block_tokens: int, dtype: torch.dtype, lora: LoraConfig | None) -> Saved:
    one_layer, two_layers = (
        saved_bytes(config, number, block_tokens, dtype, lora, recompute=False) for number in (1, 2)
    )
    one_recomputed, two_recomputed = (
        saved_bytes(config, number, block_tokens, dtype, lora, recompute=True) for number in (1, 2)
    )
    return Saved(
        outside_layers=max(0, 2 * one_layer - two_layers),
        layer=two_layers - one_layer,
        layer_recomputed=two_recomputed - one_recomputed,
    )


def saved_bytes(
    config: Any, num_layers: int, block_tokens: int, dtype: torch.dtype, lora: LoraConfig | None, *, recompute: bool
) -> int:
    """Compute the bytes that the body of a model of ``num_layers`` layers saves for one block, without parameters.

    A mask of T x T a layer is among them, which SDPA takes where documents are isolated and does without otherwise.
    """
    model = _build(_shortened(config, num_layers), dtype, lora)
    if recompute:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # its new name is not in 5.16 yet
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with FakeTensorMode(), warnings.catch_warnings(action="ignore", category=FutureWarning):
        _put_fake_tensors(model, dtype)
        body, _ = split_head(model)
        saved = SavedTensors(model)
        with saved.hooks():
            body(torch.zeros((1, block_tokens), dtype=torch.int64))
        return saved.num_bytes


def _put_fake_tensors(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace the tensors on the meta device by fake tensors on a CPU: attention differs between the two."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, device="cpu", dtype=dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, device="cpu", dtype=buffer.dtype)


class SavedTensors:
    """Counter of the storages that autograd saves, each once, without those of a model's parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._kept: dict[int, Any] = {}

    def hooks(self) -> Any:
        """Return a context in which saved tensors are counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._kept[storage._cdata] = storage  # kept, so that no later one gets its address
        return tensor

    @property
    def num_bytes(self) -> int:
        """Return the number of bytes saved so far."""
        return sum(storage.nbytes() for storage in self._kept.values())


def _shortened(config: Any, num_layers: int) -> Any:
    """Return the configuration with fewer layers."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = num_layers
    if kinds is not None:
        text.layer_types = kinds[:num_layers]
    return short
