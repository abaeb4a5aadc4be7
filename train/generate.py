"""Answers that a model writes to held-out prompts: do they end by themselves?

A chat model that loses the end of its turns continues until it is stopped, and bits per byte hardly show it: the end is one of
many tokens. So each prompt is answered greedily, and counted is how often the model itself ends its turn before a limit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from stages.contract.roles import Role
from stages.models.batches import token_batches
from stages.models.config import num_positions
from stages.models.segment_text import SegmentText
from stages.models.tokenizer import Encoding, SegmentTokenizer
from train.config import EvalConfig

_UNLIMITED: Final = 2**31


@dataclass(frozen=True)
class Answer:
    """Answer of a model to a held-out prompt.

    Attributes:
        doc_id: document number of the conversation.
        text: the answer, without the token that ends it.
        num_tokens: length of the answer, including that token.
        is_ended: the model ended its turn by itself.
    """

    doc_id: int
    text: str
    num_tokens: int
    is_ended: bool


def prompt_of(segment: SegmentText, encoding: Encoding) -> np.ndarray | None:
    """Return the tokens that a model has read when it begins its last answer of a conversation.

    Args:
        segment: the conversation.
        encoding: its tokens.

    Returns:
        Up to the template's last token before the last message of the assistant. None where the segment has no such message,
        or where no token ends between template and message.
    """
    answers = [index for index, message in enumerate(segment.messages) if message.role == "assistant"]
    if encoding.role is None or not answers:
        return None
    start = sum(len(message.content.encode()) + 1 for message in segment.messages[: answers[-1]])
    starts = np.flatnonzero((encoding.role == Role.START) & (encoding.byte_end == start))
    return encoding.ids[: int(starts[-1]) + 1] if len(starts) else None


def stop_ids(model: Any, tokenizer: SegmentTokenizer) -> list[int]:
    """Return the tokens that end a turn: that of the chat template, and those of the model's generation settings."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    configured_ids = [] if configured is None else configured if isinstance(configured, list) else [configured]
    turn_end = tokenizer.vocabulary.eos_id
    return sorted({int(token) for token in [*configured_ids, *([] if turn_end is None else [turn_end])]})


@torch.inference_mode()
def answer_prompts(
    model: Any, tokenizer: SegmentTokenizer, prompts: Sequence[tuple[int, np.ndarray]], config: EvalConfig
) -> list[Answer]:
    """Answer prompts greedily, each with at most ``config.generation_tokens`` tokens.

    Args:
        model: a transformers causal language model in eval mode.
        tokenizer: its tokenizer.
        prompts: (document, token ids) each.
        config: the evaluation's settings.

    Returns:
        In the order of the prompts; one that leaves no position of the model for an answer is left out.
    """
    room = num_positions(model, _UNLIMITED)
    kept = [(index, prompt) for index, prompt in enumerate(prompts) if len(prompt[1]) < room]
    stops = stop_ids(model, tokenizer)
    answers: dict[int, Answer] = {}
    lengths = [len(ids) + config.generation_tokens for _, (_, ids) in kept]
    for batch in token_batches(lengths, max_tokens=config.batch_tokens):
        chosen = [kept[place] for place in batch]
        limit = min(config.generation_tokens, room - max(len(ids) for _, (_, ids) in chosen))
        written = _greedy(model, [ids for _, (_, ids) in chosen], stops, limit, num_ids=tokenizer.vocabulary.size)
        for (index, (doc_id, _)), ids in zip(chosen, written, strict=True):
            answers[index] = _answer(doc_id, ids, stops, tokenizer)
    return [answers[index] for index in sorted(answers)]


def _greedy(
    model: Any, prompts: Sequence[np.ndarray], stops: Sequence[int], limit: int, *, num_ids: int
) -> list[list[int]]:
    """Return what follows each prompt: at most ``limit`` tokens, a stop included, nothing after it."""
    from transformers import GenerationConfig, LogitsProcessorList

    device = model.get_input_embeddings().weight.device
    width = max(map(len, prompts))
    ids = torch.zeros((len(prompts), width), dtype=torch.int64)
    mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for row, prompt in enumerate(prompts):  # padded on the left: all go on at the same place
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    # The model's own settings (sampling, penalties) differ between models; every model is asked in the same way.
    configured = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=list(stops) or None,
        pad_token_id=stops[0] if stops else 0,
    )
    try:
        generated = model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            logits_processor=LogitsProcessorList([_KnownIds(num_ids)]),
        )
    finally:
        model.generation_config = configured
    return [_up_to_stop(row, set(stops)) for row in generated[:, width:].tolist()]


class _KnownIds:
    """A logits processor that leaves no probability to rows of the embedding beyond the tokenizer's ids."""

    def __init__(self, num_ids: int) -> None:
        self._num_ids = num_ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        del input_ids
        scores[:, self._num_ids :] = -torch.inf
        return scores


def _up_to_stop(ids: Sequence[int], stops: set[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids) - 1)
    return list(ids[: end + 1])


def _answer(doc_id: int, ids: Sequence[int], stops: Sequence[int], tokenizer: SegmentTokenizer) -> Answer:
    is_ended = bool(ids) and ids[-1] in stops
    content = ids[:-1] if is_ended else ids
    text = b"".join(tokenizer.vocabulary.token_bytes[token] for token in content).decode("utf-8", errors="replace")
    return Answer(doc_id, text, len(ids), is_ended)
