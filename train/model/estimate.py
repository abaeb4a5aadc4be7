"""Estimate the memory of a training worker before anything is loaded: sums of bytes, all linear in known numbers.

With N workers, P parameters of which P_t are trained, layers of p parameters (p_t trained) and P_o (P_ot) outside them,
w = 2 bytes a working weight (bfloat16; 4 in float32), micro-batches of B blocks of T tokens:

- weights: 4 P / N, float32 shards;
- gradients: 4 P_t / N, float32 shards;
- optimizer: 8 P_t / N, AdamW's two float32 moments;
- gathered: w (P_o + 2 p), the working weights outside the layers, of the layer that computes and of the next one
  (w P where ``reshard_after_forward`` is off), and (w + 4) max(p_t, P_ot) for a layer's gradient and its float32 sum;
- activations: B (outside + L a), a being what a layer saves; recomputed: B (outside + L i + a), i being its input;
- loss: chunk_positions V (2 w) for the logits and their gradient, 32 V (4 + 4) for the block of them that is in float32,
  B T H (3 w) for the hidden states that are counted and two gradients of them, and 4 V H for the head's gradient, where
  it is trained;
- update: 4 P_t / N, a float32 copy of the second moments, whose roots AdamW takes of all tensors at once (torch's `foreach`
  implementation, the default on a GPU; on a CPU it goes from tensor to tensor, with two copies of the largest).

Gathered weights, activations and loss are freed when the optimizer's step begins, so the total counts them or the update,
whichever is larger.

Left out: the CUDA context, NCCL's buffers, fragmentation and the temporary tensors of single operations; so of a GPU's
memory the part ``USABLE`` is counted on.
"""

from dataclasses import dataclass

from train.config import TrainConfig
from train.model.architecture import Architecture
from train.objective.loss import block_positions

USABLE = 0.9
"""Part of a GPU's memory that an estimate may fill."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one worker, by what needs them; see the module's text."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    loss: int
    update: int

    @property
    def total(self) -> int:
        """Bytes on one worker at the peak of a step: in its passes, or in the optimizer's update after them."""
        passes = self.gathered + self.activations + self.loss
        return self.weights + self.gradients + self.optimizer + max(passes, self.update)


def estimate_memory(architecture: Architecture, config: TrainConfig, *, block_tokens: int) -> Memory:
    """Estimate the bytes on one of ``config.num_workers`` workers.

    Args:
        architecture: architecture of the model, measured for blocks of the same length.
        config: batches, precision, recomputation, chunks.
        block_tokens: T.
    """
    workers, size = config.num_workers, 2 if config.autocast == "bfloat16" else 4
    outside, layer = architecture.outside_parameters, architecture.layer_parameters
    gathered = size * (outside + 2 * layer if config.reshard_after_forward else architecture.num_parameters)
    reduced = (size + 4) * max(architecture.num_trained_in_layer, architecture.num_trained_outside)
    saved, layers = architecture.saved, architecture.num_layers
    if config.gradient_checkpointing:
        block = saved.outside_layers + layers * saved.layer_recomputed + saved.layer
    else:
        block = saved.outside_layers + layers * saved.layer
    states = 3 * size * config.micro_batch_size * block_tokens * architecture.hidden_size
    chunk = min(config.chunk_positions, config.micro_batch_size * block_tokens)
    in_float32 = block_positions("cpu" if config.device == "cpu" else "cuda", chunk)
    logits = (2 * size * chunk + 8 * in_float32) * architecture.vocab_size
    head_gradient = 0 if config.lora else 4 * architecture.vocab_size * architecture.hidden_size
    return Memory(
        weights=_share(4 * architecture.num_parameters, workers),
        gradients=_share(4 * architecture.num_trained, workers),
        optimizer=_share(8 * architecture.num_trained, workers),
        gathered=gathered + reduced,
        activations=config.micro_batch_size * block,
        loss=states + logits + head_gradient,
        update=_share(_update_bytes(architecture, config), workers),
    )


def _update_bytes(architecture: Architecture, config: TrainConfig) -> int:
    """Return the size of AdamW's temporary tensors, for all workers together."""
    everything = 4 * architecture.num_trained
    if config.device != "cpu":
        return everything
    # The embedding is the largest tensor, where it is trained.
    largest = 0 if config.lora else architecture.vocab_size * architecture.hidden_size
    return min(8 * largest, 2 * everything)


def _share(num_bytes: int, workers: int) -> int:
    return -(-num_bytes // workers)


def fits(memory: Memory, gpu_memory_gb: float) -> bool:
    """Return whether the estimate fits into a GPU's usable memory."""
    return memory.total <= USABLE * gpu_memory_gb * 1e9


def remedies(architecture: Architecture, config: TrainConfig, *, block_tokens: int) -> list[tuple[str, TrainConfig]]:
    """List single changes that make a job smaller, cheapest first: how to set each, and the changed settings.

    More workers are as many as the batch can be shared by, twice as many each time, until the job fits.
    """
    changes: list[tuple[str, dict[str, object]]] = []
    if not config.gradient_checkpointing:
        changes.append(("train.gradient_checkpointing=true", {"gradient_checkpointing": True}))
    if config.micro_batch_size > 1:
        changes.append(("train.micro_batch_size=1", {"micro_batch_size": 1}))
    workers = config.num_workers
    limit = config.gpu_memory_gb
    while config.batch_size % (2 * workers * config.micro_batch_size) == 0:
        workers *= 2
        more = config.model_copy(update={"num_workers": workers})
        if limit is not None and fits(estimate_memory(architecture, more, block_tokens=block_tokens), limit):
            break
    if workers > config.num_workers:
        changes.append((f"train.num_workers={workers}", {"num_workers": workers}))
    return [(text, config.model_copy(update=update)) for text, update in changes]


def num_steps(num_blocks: int, config: TrainConfig) -> int:
    """Return the number of optimizer steps of a job."""
    return -(-num_blocks // config.batch_size) * config.num_epochs
