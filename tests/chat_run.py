"""A run on conversations in miniature: tiny models under different chat templates, a few conversations, one TOML."""

import json
from pathlib import Path
from typing import Any, Final

from tests.chat_tokenizers import Chat
from tests.tiny_models import save_model
from tests.tiny_run import CONFIG
from tests.tiny_tokenizers import TEXTS

NUM_CONVERSATIONS: Final = 24
CHAT: Final = (
    CONFIG.replace('name = "tiny"', 'name = "chat"')
    .replace('path = "{folder}/corpus.jsonl"', 'path = "{folder}/conversations.jsonl"\nmessages_column = "messages"')
    .replace("documents_per_shard = 4", "documents_per_shard = 4\nmax_bad_fraction = 0.5")
    .replace("= 64", "= 160")
    .replace(
        'dtype = "float32"\n\n[engine]', 'dtype = "float32"\nnum_generations = 3\ngeneration_tokens = 8\n\n[engine]'
    )
)
"""The tiny run's settings, with room for templates."""


def conversations() -> list[list[dict[str, Any]]]:
    """Conversations of one to three questions, some with a system message; the sixth holds nothing, the eighth a tool call."""
    found = []
    for index in range(NUM_CONVERSATIONS):
        messages: list[dict[str, Any]] = []
        if index % 3 == 0:
            messages.append({"role": "system", "content": "Answer briefly."})
        for turn in range(1 + index % 3):
            text = TEXTS[(index + turn) % len(TEXTS)].strip()
            messages += [
                {"role": "user", "content": f"Question {index}.{turn}: {text[:20]}?"},
                {"role": "assistant", "content": text[:60]},
            ]
        found.append(messages)
    found[5] = []
    found[7][-1] = {"role": "assistant", "content": "", "tool_calls": [{"name": "search"}]}
    return found


def save_chat_inputs(folder: Path) -> Path:
    """Write models, conversations and configuration.

    Returns:
        The TOML file.
    """
    models: dict[str, tuple[str, str, Chat]] = {
        "llama": ("llama", "spm-bpe", "gemma"),
        "neox": ("gpt_neox", "byte-bpe", "chatml"),
    }
    for seed, (name, (architecture, family, chat)) in enumerate(models.items(), 1):
        save_model(folder / name, architecture=architecture, tokenizer_family=family, seed=seed, chat=chat)
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) for messages in conversations()]
    (folder / "conversations.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = folder / "chat.toml"
    config.write_text(CHAT.format(folder=folder))
    return config
