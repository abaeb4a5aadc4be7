"""Cross-entropy of a text under a model, comparable between tokenizers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["CrossEntropy", "cross_entropy", "first_common_byte"]


@dataclass(frozen=True)
class CrossEntropy:
    """Negative log-probability of gold tokens, summed over tokens.

    Attributes:
        nats: sum of -ln p(gold).
        num_tokens: gold tokens predicted, special tokens left out.
        num_bytes: bytes of text that those tokens cover.
    """

    nats: float
    num_tokens: int
    num_bytes: int

    def __add__(self, other: "CrossEntropy") -> "CrossEntropy":
        return CrossEntropy(
            self.nats + other.nats, self.num_tokens + other.num_tokens, self.num_bytes + other.num_bytes
        )

    @property
    def nats_per_token(self) -> float:
        """Mean loss per token; NaN without tokens."""
        return self.nats / self.num_tokens if self.num_tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Mean loss per byte of text, in bits; NaN without bytes."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan


def cross_entropy(
    gold_logprob: np.ndarray, byte_end: np.ndarray, is_special: np.ndarray, *, first_byte: int = 0
) -> CrossEntropy:
    """Compute the cross-entropy of one segment.

    A special token without bytes (BOS, EOS) is left out, so that models with different ones compare; one that stands for
    text (``<unk>``) counts with its bytes. A first token that nothing predicts, of a model that has neither BOS nor EOS to
    stand before a text, is left out with its bytes, and so are all bytes before ``first_byte``.

    Args:
        gold_logprob: (N,) ln p(token t+1 | tokens <= t); NaN at the last position.
        byte_end: (N,) where each token ends in the segment, bytes.
        is_special: (N,) bool, the token is a special one.
        first_byte: tokens that begin before it are left out, so that models compare on the same bytes.
    """
    starts = byte_end[:-1]
    counted = (~is_special[1:] | (np.diff(byte_end) > 0)) & (starts >= first_byte)
    return CrossEntropy(
        nats=float(-gold_logprob[:-1][counted].sum(dtype=np.float64)),
        num_tokens=int(counted.sum()),
        num_bytes=int(np.diff(byte_end)[counted].sum()),
    )


def learnt_cross_entropy(
    gold_logprob: np.ndarray,
    byte_end: np.ndarray,
    *,
    is_trained: np.ndarray,
    ends_turn: np.ndarray,
    first_byte: int = 0,
) -> CrossEntropy:
    """Compute the cross-entropy of the tokens of a conversation that are trained on.

    The end of a turn counts with its loss, since a model is to know when to stop, and without bytes, since its virtual byte is
    none of the text.

    Args:
        gold_logprob: (N,) ln p(token t+1 | tokens <= t); NaN at the last position.
        byte_end: (N,) where each token ends, bytes.
        is_trained: (N,) bool, the token is trained on.
        ends_turn: (N,) bool, the token ends a turn.
        first_byte: tokens that begin before it are left out.
    """
    counted = is_trained[1:] & (byte_end[:-1] >= first_byte)
    num_bytes = np.diff(byte_end)[counted].sum() - ends_turn[1:][counted].sum()
    return CrossEntropy(
        nats=float(-gold_logprob[:-1][counted].sum(dtype=np.float64)),
        num_tokens=int(counted.sum()),
        num_bytes=int(num_bytes),
    )


def first_common_byte(byte_ends: Sequence[np.ndarray]) -> int:
    """Return the first byte of a text from which on several models all predict.

    A model that has nothing to stand before a text does not predict its first token. From the byte returned, every model
    has a token that begins there, and predicts it and all that follow.

    Args:
        byte_ends: byte ends of each model's tokens; the first is 0 if a token stands before the text.

    Returns:
        0 where all models predict the whole text.
    """
    start = max((int(ends[0]) for ends in byte_ends if len(ends)), default=0)
    while True:
        # A token that reaches over the byte is predicted by its own model, but holds bytes that another does not predict.
        begins = [int(ends[min(int(np.searchsorted(ends, start)), len(ends) - 1)]) for ends in byte_ends if len(ends)]
        later = max([start, *begins])
        if later == start:
            return start
        start = later
