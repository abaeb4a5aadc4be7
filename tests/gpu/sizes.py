"""How large the models and the data of ``make gpu-check`` are: as in a real run, or so small that a CPU needs seconds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ARCHITECTURES: Final = Path(__file__).parents[2] / "pipeline" / "configs" / "architectures"
LLAMA_2_7B: Final = ARCHITECTURES / "meta-llama--Llama-2-7b-hf.json"


@dataclass(frozen=True)
class Size:
    """Shapes of one size.

    Attributes:
        is_full: limits of speed and memory hold.
        matmul_width: of the square matrices that are multiplied.
        copy_bytes: that are copied to the device at once.
        rounds: repetitions of a measurement, of which the median counts.
        exact_shapes: settings of the two-layer models that are compared with the CPU, by model type.
        exact_lengths: tokens of the sequences that they read.
        gradient_shape: (blocks, tokens) of the batch whose gradients are compared.
        llama: changes to Llama-2-7B's configuration.
        text_tokens: that the logits section reads, about.
        median_document, document_spread: of the documents' lengths in tokens, lognormal. MiniPile's mean is about 1,500.
        segment_tokens: of the longest segments, about.
        batch_tokens, head_positions, head_chunks: of the logits section: the token budget, the positions that the head
            alone is timed on, and its chunk sizes.
        training_layers: of Llama-2's width; of the train step.
        block_tokens: tokens of a training block.
        step_blocks: blocks in an optimizer step.
        micro_batches: sizes that are measured.
        train_steps: that are measured after a warm one.
        loss_positions, loss_width, loss_vocabularies, loss_chunks: of the loss section.
        resume_model: changes to Llama-2-7B's configuration for the model that is resumed.
        resume_block_tokens: tokens of its blocks.
        document_lengths: of the packed documents, by block.
        reader_tokens, reader_blocks_per_file, reader_steps: of the reader section.
    """

    is_full: bool
    matmul_width: int
    copy_bytes: int
    rounds: int
    exact_shapes: Mapping[str, Mapping[str, Any]]
    exact_lengths: tuple[int, ...]
    gradient_shape: tuple[int, int]
    llama: Mapping[str, Any]
    text_tokens: int
    median_document: float
    document_spread: float
    segment_tokens: int
    batch_tokens: int
    head_positions: int
    head_chunks: tuple[int, ...]
    training_layers: int
    block_tokens: int
    step_blocks: int
    micro_batches: tuple[int, ...]
    train_steps: int
    loss_positions: int
    loss_width: int
    loss_vocabularies: tuple[int, ...]
    loss_chunks: tuple[int, ...]
    resume_model: Mapping[str, Any]
    resume_block_tokens: int
    document_lengths: tuple[tuple[int, ...], ...]
    reader_tokens: int
    reader_blocks_per_file: int
    reader_steps: int


def _gemma(width: int, *, window: int, vocab_size: int) -> dict[str, Any]:
    """Gemma-3 has tied embeddings, one head of keys, and a window in every layer but some."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": width // 4,
        "query_pre_attn_scalar": width // 4,
        "sliding_window": window,
        "layer_types": ["sliding_attention", "full_attention"],
    }


def _llama(width: int, *, vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    }


SIZES: Final[Mapping[str, Size]] = {
    "full": Size(
        is_full=True,
        matmul_width=8192,
        copy_bytes=2**30,
        rounds=5,
        exact_shapes={
            "llama": _llama(1024, vocab_size=32_000),
            "gemma3_text": _gemma(1024, window=16, vocab_size=262_144),
        },
        exact_lengths=(257, 64, 200, 1, 129, 160, 93, 120),
        gradient_shape=(2, 24),
        llama={},
        text_tokens=400_000,
        median_document=650,
        document_spread=1.3,
        segment_tokens=2048,
        batch_tokens=8192,
        head_positions=65_536,
        head_chunks=(64, 256, 1024, 4096),
        training_layers=12,
        block_tokens=2048,
        step_blocks=16,
        micro_batches=(2, 4, 8),
        train_steps=3,
        loss_positions=8192,
        loss_width=4096,
        loss_vocabularies=(32_000, 128_256),
        loss_chunks=(256, 1024, 2048),
        resume_model={"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
        resume_block_tokens=256,
        document_lengths=((700, 1000, 348), (90, 1400, 200, 158)),
        reader_tokens=20_000_000,
        reader_blocks_per_file=256,
        reader_steps=20,
    ),
    "toy": Size(
        is_full=False,
        matmul_width=128,
        copy_bytes=2**20,
        rounds=2,
        exact_shapes={
            "llama": _llama(64, vocab_size=500),
            "gemma3_text": _gemma(64, window=8, vocab_size=700),
        },
        exact_lengths=(33, 8, 20, 1, 17),
        gradient_shape=(2, 12),
        llama={
            "vocab_size": 400,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        text_tokens=600,
        median_document=40,
        document_spread=0.8,
        segment_tokens=64,
        batch_tokens=256,
        head_positions=64,
        head_chunks=(16, 64),
        training_layers=2,
        block_tokens=32,
        step_blocks=4,
        micro_batches=(2, 4),
        train_steps=2,
        loss_positions=64,
        loss_width=64,
        loss_vocabularies=(400,),
        loss_chunks=(16, 64),
        resume_model={
            "vocab_size": 400,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        resume_block_tokens=16,
        document_lengths=((7, 12, 5), (3, 9)),
        reader_tokens=4_000,
        reader_blocks_per_file=8,
        reader_steps=2,
    ),
}
