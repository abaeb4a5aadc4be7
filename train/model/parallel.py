"""Model shared among the workers: FSDP2 (``fully_shard``) over the decoder layers and the root.

Parameters, gradients and optimizer state are float32 shards; a layer's parameters are gathered in ``autocast``'s
precision when the layer runs, and gradients are summed over the workers in float32. The embeddings, the final norm and
the LM head belong to the root, whose parameters stay gathered from the forward to the end of the backward pass: the
loss, which applies the head to chunks of positions and computes its gradient there, is part of the root's forward. Tied
embeddings are then one gathered parameter in both places.
"""

import logging
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from stages.models.heads import Body, ModelHead, split_head
from train.config import TrainConfig
from train.data.blocks import MicroBatch
from train.distributed import Workers
from train.model.architecture import decoder_layers
from train.objective.loss import LossSettings, fused_loss

logger = logging.getLogger(__name__)


class LossModel(nn.Module):
    """Causal language model together with its training loss: the root module of FSDP."""

    def __init__(self, model: Any, config: TrainConfig) -> None:
        """Wrap a model.

        Args:
            model: a transformers causal language model.
            config: divergence, temperature, chunks.
        """
        super().__init__()
        self.model = model
        self._config = config
        halves: tuple[Body, ModelHead] = split_head(model)
        self._body, self._head = halves

    def forward(self, batch: MicroBatch, *, clm_factor: float, fusion_factor: float) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the loss of one micro-batch.

        Args:
            batch: batch on the model's device.
            clm_factor: weight of the sum of the CLM loss: lambda over the labelled positions of the whole step, all workers.
            fusion_factor: weight of the sum of the fusion loss.

        Returns:
            What is differentiated, then the two sums, without gradient; float32 scalars. A batch in which no position
            counts gives zeros, and zero gradients: its passes are collective operations like any other's.
        """
        isolated = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
        hidden = self._body(batch.ids, **isolated)
        config = self._config
        settings = LossSettings(
            clm_factor=clm_factor,
            fusion_factor=fusion_factor,
            divergence=config.fusion_loss,
            temperature=config.temperature,
            chunk_positions=config.chunk_positions,
            tail_loss=config.tail_loss,
        )
        sums = fused_loss(hidden.flatten(0, 1), self._head, batch.labels.flatten(), batch.targets, settings)
        return sums.total, sums.clm, sums.fusion


def shard_model(model: Any, config: TrainConfig, workers: Workers) -> LossModel:
    """Share a model among the workers, in place; its parameters are shards from now on.

    Args:
        model: a transformers causal language model, on the meta device or with the same values on every worker.
        config: precision, resharding, recomputation, compilation, chunks.
        workers: over whom.
    """
    layers = decoder_layers(model)
    if not layers:
        logger.warning("%s: no list of decoder layers found; it is sharded as one unit", type(model).__name__)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.compile:
        for layer in layers:
            layer.compile()
    dtype = torch.bfloat16 if config.autocast == "bfloat16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    # Layers first, then the root, which takes the parameters that no layer has.
    for layer in layers:
        fully_shard(layer, mesh=workers.mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    root = LossModel(model, config)
    # The root's inputs hold probabilities of the fused distributions, which stay float32.
    root_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(root, mesh=workers.mesh, mp_policy=root_policy, reshard_after_forward=False)
    # Sum gradients over workers instead of averaging them: the losses are divided by the counts of the whole step.
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return root.train()


def fill_parameters(root: LossModel, loaded: Any | None, workers: Workers) -> None:
    """Give a sharded model on the meta device its values, one tensor at a time.

    Args:
        root: the sharded model.
        loaded: the same model whole, on the CPU of the first worker; None on the others.
        workers: all workers, which must call this together.
    """
    model = root.model
    tied = _tied_names(model)
    root.to_empty(device=workers.device)
    # ``to_empty`` allocates one tensor per name, which separates tied weights: tie them again.
    for alias, name in tied.items():
        owner, _, attribute = alias.rpartition(".")
        model.get_submodule(owner).register_parameter(attribute, model.get_parameter(name))
    values = {} if loaded is None else loaded.state_dict()
    set_model_state_dict(model, values, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    buffers = {} if loaded is None else dict(loaded.named_buffers())
    # Non-persistent buffers, such as the rotary embedding's frequencies, are in no state dict.
    for name, buffer in model.named_buffers():
        if loaded is not None:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=0)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Gather all weights on the CPU of the first worker; the others get an empty dictionary."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Map further names of shared parameters to the first name of each."""
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            aliases[name] = first[id(parameter)]
    return aliases
