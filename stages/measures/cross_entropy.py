"""How well a model knows a text, comparable between tokenizers."""

import math
from dataclasses import dataclass

import numpy as np

TEACHER_FLOOR = 1e-4
"""Smallest probability that teacher NLL counts: a candidate list that misses the gold token costs 9.2 nats."""


@dataclass(frozen=True)
class CrossEntropy:
    """Negative log-probability of gold tokens, summed.

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
        """Mean loss a token; NaN without tokens."""
        return self.nats / self.num_tokens if self.num_tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Mean loss a byte of text, in bits; NaN without bytes."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan


def cross_entropy(gold_logprob: np.ndarray, byte_end: np.ndarray, is_special: np.ndarray) -> CrossEntropy:
    """Cross-entropy of one segment.

    A special token (BOS, EOS) has no bytes and is left out, so that models with different ones compare. A first token
    that nothing predicts (no BOS) is left out with its bytes.

    Args:
        gold_logprob: (N,) ln p(token t+1 | tokens <= t); NaN at the last position.
        byte_end: (N,) where each token ends in the segment, bytes.
        is_special: (N,) bool, the token is a special one.
    """
    counted = ~is_special[1:]
    return CrossEntropy(
        nats=float(-gold_logprob[:-1][counted].sum(dtype=np.float64)),
        num_tokens=int(counted.sum()),
        num_bytes=int(np.diff(byte_end)[counted].sum()),
    )
