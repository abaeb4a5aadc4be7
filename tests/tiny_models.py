"""Tiny random causal language models with real tokenizers, made in a second, for tests that need a model on disk.

The weights are random, but large enough that the next-token distributions are far from uniform and depend on the
context: a wrong position, mask or head shows in the numbers.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.chat_tokenizers import Chat, save_chat_tokenizer
from tests.tiny_tokenizers import Family, save_tokenizer

Architecture = Literal[
    "llama", "gpt_neox", "mpt", "gemma2", "gemma3", "qwen2", "phi", "cohere", "granite", "opt", "gpt2"
]
ARCHITECTURES: Final[tuple[Architecture, ...]] = get_args(Architecture)

HIDDEN: Final = 64
_SHAPE: Final = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_SETTINGS: Final[dict[Architecture, dict[str, Any]]] = {
    "llama": {**_SHAPE, "num_key_value_heads": 2},
    "gpt_neox": _SHAPE,
    "mpt": {"d_model": HIDDEN, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2},  # ALiBi, tied head, no SDPA
    "gemma2": {  # tied head, logits are soft-capped
        **_SHAPE,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        "attn_logit_softcapping": None,  # SDPA cannot
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {  # tied head, sliding windows, scaled embeddings
        **_SHAPE,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen2": {**_SHAPE, "num_key_value_heads": 2},  # biases in attention
    "phi": _SHAPE,  # the head has a bias
    "cohere": {**_SHAPE, "num_key_value_heads": 2, "logit_scale": 2.0},  # logits are scaled behind the head
    "granite": {**_SHAPE, "num_key_value_heads": 2, "logits_scaling": 0.5},  # logits are divided
    "opt": {**_SHAPE, "ffn_dim": 128, "word_embed_proj_dim": HIDDEN},  # learned positions counted from the mask
    "gpt2": {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4},
}
_MODEL_TYPE: Final = {"gemma3": "gemma3_text"}


def save_model(
    folder: Path,
    *,
    architecture: Architecture = "llama",
    tokenizer_family: Family = "spm-bpe",
    seed: int = 0,
    vocab_padding: int = 0,
    vocab_size: int = 400,
    max_positions: int = 2048,
    final_logit_softcapping: float | None = None,
    settings: Mapping[str, Any] | None = None,
    chat: Chat | None = None,
) -> Path:
    """Save a random two-layer model (float32 safetensors) and its tokenizer into one folder, which it returns.

    Args:
        folder: created if needed; loads through ``ModelConfig(name=..., path=folder)``.
        architecture: one of ``ARCHITECTURES``.
        tokenizer_family: see ``tiny_tokenizers.save_tokenizer``.
        seed: of the weights.
        vocab_padding: embedding rows beyond the tokenizer's length; their logits are made the largest of all. Negative:
            rows that are missing for the last tokens.
        vocab_size: of the tokenizer.
        max_positions: the longest input of the architectures that have learned positions.
        final_logit_softcapping: Gemma only.
        settings: of the architecture's transformers configuration, instead of this module's.
        chat: whose chat template and control tokens the tokenizer has; None: neither.
    """
    if chat is None:
        save_tokenizer(tokenizer_family, folder, vocab_size=vocab_size)
    else:
        save_chat_tokenizer(chat, folder, family=tokenizer_family, vocab_size=vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = {**_SETTINGS[architecture], **(settings or {}), "vocab_size": len(tokenizer) + vocab_padding}
    if architecture not in ("mpt", "gpt2"):
        settings["max_position_embeddings"] = max_positions
    if final_logit_softcapping is not None:
        settings["final_logit_softcapping"] = final_logit_softcapping
    config = AutoConfig.for_model(
        _MODEL_TYPE.get(architecture, architecture),
        **settings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, seed, num_padding_rows=vocab_padding)
    model.save_pretrained(folder)
    reloaded = AutoTokenizer.from_pretrained(folder)  # some model types bring a tokenizer class of their own
    if type(reloaded.backend_tokenizer.model) is not type(tokenizer.backend_tokenizer.model):
        raise ValueError(
            f"{architecture} makes another tokenizer of the family {tokenizer_family}: choose another pair"
        )
    return folder


def split_weights(folder: Path) -> tuple[str, str]:
    """Divide a saved model's weights among two files with an index; returns the files' names."""
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    tensors = load_file(folder / "model.safetensors")
    weight_map = {name: names[number % 2] for number, name in enumerate(sorted(tensors))}
    for file in names:
        held = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return names


def _randomise(model: Any, seed: int, *, num_padding_rows: int) -> None:
    """Give every parameter a scale at which it matters."""
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings()
    is_tied = head.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter is head.weight:
                # A tied head favours the token that was just read; the smaller scale keeps it from taking all.
                parameter.copy_(noise * (0.15 if is_tied else 0.35))
            elif parameter.dim() >= 2:
                parameter.copy_(noise * 0.15)
            elif name.endswith("bias"):
                parameter.copy_(noise * (0.5 if parameter is head.bias else 0.1))
            else:
                parameter.add_(noise * 0.05)  # norms: around what the architecture starts from
        if num_padding_rows > 0:
            # As after unlucky training: rows that no token has would win if they were let.
            head.weight[-num_padding_rows:] *= 4
