"""Overlapping windows over a sequence that is longer than a model sees at once."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ContextWindow:
    """One input of the model: the sequence's first ``num_repeated`` tokens (the prefix), then tokens [start, end).

    Its outputs are taken for positions [take_start, end); the positions before are context.
    """

    start: int
    end: int
    take_start: int
    num_repeated: int

    def __len__(self) -> int:
        """Return the number of tokens that the model sees."""
        return self.num_repeated + self.end - self.start

    def tokens(self, ids: np.ndarray) -> np.ndarray:
        """Return the model's input, (len(self),), from the ids of the whole sequence."""
        return np.concatenate([ids[: self.num_repeated], ids[self.start : self.end]])

    @property
    def taken(self) -> slice:
        """Slice of the taken positions in the model's output."""
        return slice(self.num_repeated + self.take_start - self.start, len(self))


def context_windows(length: int, *, max_length: int, num_prefix: int = 0) -> list[ContextWindow]:
    """Cover a sequence with windows of at most ``max_length`` tokens; one window if it fits.

    Each further window begins half a window later: every position is taken exactly once, with everything before it or at
    least max_length / 2 tokens of context, itself included. The prefix of a text (BOS) is repeated before each window, since
    some models (Gemma) predict noise without it.

    Args:
        length: tokens of the sequence, >= 1.
        max_length: most tokens of a window, >= 2 + num_prefix.
        num_prefix: tokens at the sequence's start that each further window repeats, 0 or 1.
    """
    first_end = min(length, max_length)
    windows = [ContextWindow(start=0, end=first_end, take_start=0, num_repeated=0)]
    while (taken := windows[-1].end) < length:
        end = min(length, taken + max_length // 2)
        windows.append(
            ContextWindow(start=end - (max_length - num_prefix), end=end, take_start=taken, num_repeated=num_prefix)
        )
    return windows
