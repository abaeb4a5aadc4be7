"""Match tokens of two models by message: the edit-distance pairing treats each message as a separate text."""

import itertools
from collections.abc import Iterator

import numpy as np

from stages.contract.roles import Role


def text_slices(
    source_byte_end: np.ndarray, target_byte_end: np.ndarray, source_roles: np.ndarray, target_roles: np.ndarray
) -> list[tuple[slice, slice]]:
    """Find the tokens that each text has on both sides: one text, or the messages of a conversation.

    Args:
        source_byte_end: (N,) nondecreasing.
        target_byte_end: (M,).
        source_roles: (N,) values of ``Role``.
        target_roles: (M,).

    Returns:
        For each message with tokens of its content on both sides: where these are among the source's tokens, and among the
        target's. For plain text one pair: all tokens between BOS and EOS.
    """
    sides = ((source_byte_end, source_roles), (target_byte_end, target_roles))
    if all(_is_one_text(roles) for _, roles in sides):
        ranges = [_text_range(roles) for _, roles in sides]
        return [(ranges[0], ranges[1])] if all(text_range.stop > text_range.start for text_range in ranges) else []
    runs = [list(_runs(roles)) for _, roles in sides]
    borders = _borders(sides, runs)
    source, target = (
        {number: tokens for run in side_runs for number, tokens in _by_message(ends, run, borders)}
        for (ends, _), side_runs in zip(sides, runs, strict=True)
    )
    return [(source[number], target[number]) for number in sorted(source.keys() & target.keys())]


def _is_one_text(roles: np.ndarray) -> bool:
    """Return whether nothing but one BOS before and one EOS after it accompanies the text."""
    return all(
        int((roles == role).sum()) <= limit for role, limit in ((Role.BOS, 1), (Role.EOS, 1), (Role.TEMPLATE, 0))
    )


def _text_range(roles: np.ndarray) -> slice:
    """Return the positions between BOS and EOS."""
    text = np.flatnonzero(roles == Role.TEXT)
    return slice(int(text[0]), int(text[-1]) + 1) if len(text) else slice(0, 0)


def _runs(roles: np.ndarray) -> Iterator[slice]:
    """Yield the tokens that stand together: those of a content, or of two that no template token separates."""
    is_text = np.concatenate([[False], roles == Role.TEXT, [False]])
    borders = np.flatnonzero(is_text[1:] != is_text[:-1])
    for start, stop in zip(borders[::2].tolist(), borders[1::2].tolist(), strict=True):
        yield slice(start, stop)


def _by_message(byte_end: np.ndarray, run: slice, borders: np.ndarray) -> Iterator[tuple[int, slice]]:
    r"""Yield the messages that a run of text tokens has bytes of, by their number: nearly always one.

    Where one token holds the end of a content and all that the template writes before the next (``.\n\n``), two contents are
    one run. The other side knows the end between them, unless it joins them too.
    """
    number = np.searchsorted(borders, byte_end[run])
    starts = np.flatnonzero(np.append(True, number[1:] != number[:-1])).tolist()
    for start, stop in itertools.pairwise([*starts, len(number)]):
        yield int(number[start]), slice(run.start + start, run.start + stop)


def _borders(sides: tuple[tuple[np.ndarray, np.ndarray], ...], runs: list[list[slice]]) -> np.ndarray:
    """Return bytes at which messages end: at least one between any two contents, and none inside a content.

    Most ends are known: a turn's last token ends there, and so does the last template token before the next message. But a
    template may have neither (Llama-2's after a user's turn). Then the message still ends after the last byte of its content
    and before the next content's first token ends. One byte is chosen for all sides whose gaps overlap, since they
    are gaps at the same end: the one right behind the content whose last token ends last.
    """
    borders = sorted({int(end) for ends, roles in sides for end in ends[(roles == Role.START) | (roles == Role.EOS)]})
    gaps = [
        (int(ends[before.stop - 1]) + 1, int(ends[after.stop - 1]) - 1)
        for (ends, _), side_runs in zip(sides, runs, strict=True)
        for before, after in itertools.pairwise(side_runs)
    ]
    for low, high in sorted(gaps, reverse=True):
        index = int(np.searchsorted(borders, low))
        if index == len(borders) or borders[index] > high:
            borders.insert(index, low)
    return np.array(borders, np.int64)
