"""Interface of the backends that run a model for the logits stage, and the code that they share.

A backend takes token ids and returns arrays. Text, tokenizers and Arrow belong to the stage.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch

from stages.contract.columns import PAD_ID
from stages.models.batches import token_batches
from stages.models.windows import ContextWindow

log = logging.getLogger(__name__)

_MEMORY_MESSAGES: Final = ("out of memory", "can't allocate memory")


class NotFiniteError(ValueError):
    """Error of a model that gave a logprob that is not a finite number.

    Attributes:
        sequence: index of the sequence.
        position: position in the sequence.
    """

    def __init__(self, sequence: int, position: int) -> None:
        super().__init__(f"logprobs are not finite at position {position} of sequence {sequence}")
        self.sequence = sequence
        self.position = position


@dataclass
class Predictions:
    """Predictions at all positions of S sequences, end to end: P in all; and what computing them took.

    Attributes:
        starts: (S + 1,) int64, where each sequence's positions lie.
        topk_ids: (P, k) int32, descending probability, equal ones in ascending order of id.
        topk_logprobs: (P, k) float32, natural logs, normalised over the ids that the tokenizer has.
        gold_logprob: (P,) float32 of the next token; NaN at the last position of each sequence.
        sample_ids: (P, m) int32, ascending, tokens drawn from what the top-k leave out, in proportion to their probability; all
            m are ``PAD_ID`` where nothing is left out.
        forward_seconds: time inside the model, head and top-k included.
        oom_retries: number of times that memory ran out and a smaller budget was used.
    """

    starts: np.ndarray
    topk_ids: np.ndarray
    topk_logprobs: np.ndarray
    gold_logprob: np.ndarray
    sample_ids: np.ndarray
    forward_seconds: float = 0.0
    oom_retries: int = 0

    @classmethod
    def empty(cls, lengths: Sequence[int], *, width: int, num_samples: int = 0) -> "Predictions":
        """Return room for sequences of these lengths, with ``width`` entries and ``num_samples`` draws at each position."""
        starts = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=starts[1:])
        return cls(
            starts=starts,
            topk_ids=np.zeros((starts[-1], width), np.int32),
            topk_logprobs=np.zeros((starts[-1], width), np.float32),
            gold_logprob=np.full(starts[-1], np.nan, np.float32),
            sample_ids=np.full((starts[-1], num_samples), PAD_ID, np.int32),
        )

    def positions_of(self, sequence: int) -> slice:
        """Return the positions of a sequence."""
        return slice(self.starts[sequence], self.starts[sequence + 1])

    def put(
        self,
        rows: np.ndarray,
        ids: np.ndarray,
        logprobs: np.ndarray,
        gold_logprob: np.ndarray,
        sample_ids: np.ndarray | None = None,
    ) -> None:
        """Store the predictions at some positions.

        Args:
            rows: (N,) their places among all P.
            ids: (N, k).
            logprobs: (N, k).
            gold_logprob: (N,); ignored at the last position of a sequence.
            sample_ids: (N, m); None: nothing was drawn.

        Raises:
            NotFiniteError: a logprob is not finite; of several the first.
        """
        is_last = np.isin(rows + 1, self.starts)
        finite = np.isfinite(logprobs).all(axis=1) & (np.isfinite(gold_logprob) | is_last)
        if not finite.all():
            row = int(rows[~finite].min())
            sequence = int(np.searchsorted(self.starts, row, side="right")) - 1
            raise NotFiniteError(sequence, row - int(self.starts[sequence]))
        self.topk_ids[rows] = ids
        self.topk_logprobs[rows] = logprobs
        self.gold_logprob[rows] = np.where(is_last, np.nan, gold_logprob)
        if sample_ids is not None:
            self.sample_ids[rows] = sample_ids


class Backend(Protocol):
    """Loaded model that predicts.

    Attributes:
        max_length: most tokens of a window: ``logits.max_length``, or the model's positions where they are fewer.
        num_embeddings: ids at or above it cannot be given to the model.
        versions: values that manifests record: the backend's name, and everything that affects its numbers.
    """

    max_length: int
    num_embeddings: int
    versions: Mapping[str, str]

    def predict(
        self,
        sequences: Sequence[np.ndarray],
        cuts: Sequence[Sequence[ContextWindow]],
        uniforms: np.ndarray | None = None,
    ) -> Predictions:
        """Run the model over sequences.

        Args:
            sequences: (N,) token ids each, below ``num_embeddings``.
            cuts: the windows of each sequence, of at most ``max_length`` tokens.
            uniforms: (P, m) float64 in [0, 1], ascending in a row, for the P positions of all sequences end to end: where each
                draw of a position lies in the cumulated rest of its distribution. None: nothing is drawn.

        Raises:
            ValueError: draws are requested from a backend that does not see the full distribution.
            NotFiniteError: the model gave a number that is not finite.
            RuntimeError: memory ran out although the budgets are as small as they get.
        """


def refuse_draws(uniforms: np.ndarray | None, *, model: str, who: str) -> None:
    """Refuse to draw from the tail if the backend gives no full distribution.

    Args:
        uniforms: (P, m), as given to ``Backend.predict``; None: nothing is to be drawn.
        model: the model's name.
        who: name of the backend, which gives only the largest entries.

    Raises:
        ValueError: there is something to draw; says what to set.
    """
    if uniforms is not None:
        raise ValueError(
            f"model {model}: {uniforms.shape[1]} draws per position from the rest of the vocabulary were requested, "
            f"but {who} returns only the largest entries: set logits.backend = 'transformers', or logits.tail_samples "
            "= 0"
        )


def descending(ids: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort rows in descending order of logprob, equal ones by ascending id: no server or engine promises that.

    Args:
        ids: (N, k).
        logprobs: (N, k).
    """
    order = np.lexsort((ids, -logprobs), axis=1)
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1)


def run_batches(
    lengths: np.ndarray,
    *,
    budget: Callable[[], int],
    run: Callable[[np.ndarray], None],
    can_shrink: Callable[[int], bool],
    shrink: Callable[[np.ndarray], None],
) -> int:
    """Run windows in batches under a token budget; where memory runs out, continue with a smaller one.

    Args:
        lengths: (W,) tokens of each window.
        budget: most tokens of a batch, as it is now.
        run: runs a batch, given as indices into ``lengths``.
        can_shrink: whether a batch of that many windows that did not fit can be split further.
        shrink: makes the budget smaller, after a batch that did not fit.

    Returns:
        The number of times that memory ran out.
    """
    pending = token_batches(lengths, max_tokens=budget())
    oom_retries = 0
    while pending:
        if _fits(pending[0], run=run, can_shrink=can_shrink):
            pending = pending[1:]
            continue
        oom_retries += 1
        shrink(pending[0])  # outside the handler: the exception's traceback would keep the batch's tensors alive
        left = np.concatenate(pending)
        pending = [left[batch] for batch in token_batches(lengths[left], max_tokens=budget())]
    return oom_retries


def _fits(batch: np.ndarray, *, run: Callable[[np.ndarray], None], can_shrink: Callable[[int], bool]) -> bool:
    try:
        run(batch)
    except RuntimeError as error:
        if not is_out_of_memory(error) or not can_shrink(len(batch)):
            raise
        log.warning("out of memory: %s", str(error).split("\n", 1)[0])
        return False
    return True


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether memory ran out.

    torch has an error class for a GPU; a CPU's allocator and other processes raise a plain RuntimeError.
    """
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(message in text for message in _MEMORY_MESSAGES)
