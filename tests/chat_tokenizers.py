"""Tiny tokenizers with the chat templates of six families of models, saved as folders that transformers loads."""

from pathlib import Path
from typing import Any, Final, Literal

from tests.tiny_tokenizers import Family, save_tokenizer

Chat = Literal["chatml", "llama2", "llama3", "gemma", "mistral", "phi"]
CHATS: Final[tuple[Chat, ...]] = ("chatml", "llama2", "llama3", "gemma", "mistral", "phi")
TEMPLATES: Final = Path(__file__).parent / "chat_templates"

FAMILY: Final[dict[Chat, Family]] = {
    "chatml": "byte-bpe",
    "llama2": "spm-bpe",
    "llama3": "byte-bpe",
    "gemma": "spm-bpe",
    "mistral": "spm-bpe",
    "phi": "spm-bpe",
}
"""The kind of tokenizer that goes with each template in the wild."""

TURN_END: Final[dict[Chat, str]] = {
    "chatml": "<|im_end|>",
    "llama2": "</s>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
    "phi": "<|end|>",
}
"""The token that ends the assistant's turns."""

_CONTROL: Final[dict[Chat, tuple[str, ...]]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama2": (),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "mistral": ("[INST]", "[/INST]"),
    "phi": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
}
_BOS: Final = {"llama3": "<|begin_of_text|>"}


def save_chat_tokenizer(chat: Chat, folder: str | Path, *, family: Family | None = None, **settings: Any) -> Path:
    """Save a tokenizer with the control tokens and the template of a family of chat models.

    Phi's tokens swallow the white space behind them, and Gemma's tokenizer has tokens of line ends, as the real ones do. A
    tokenizer without BOS or EOS gets ``<s>`` or ``</s>`` where the template needs them.

    Args:
        chat: whose template.
        folder: created if missing.
        family: kind of tokenizer; None: the one that goes with the template.
        settings: of ``save_tokenizer``.

    Returns:
        The folder.
    """
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    save_tokenizer(family or FAMILY[chat], folder, **settings)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    control = [AddedToken(text, special=True, normalized=False, rstrip=chat == "phi") for text in _CONTROL[chat]]
    tokenizer.add_tokens(control, special_tokens=True)
    if chat == "gemma":
        tokenizer.add_tokens([AddedToken("\n" * count, normalized=False) for count in (2, 3)])
    if tokenizer.bos_token is None or chat in _BOS:
        tokenizer.add_special_tokens({"bos_token": _BOS.get(chat, "<s>")})
    if chat in ("llama2", "mistral"):
        tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.chat_template = (TEMPLATES / f"{chat}.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(str(folder))
    return Path(folder)
