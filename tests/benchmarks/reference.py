"""Straightforward alignment in Python, which the benchmarks compare with: one call per cell, per pair and per position.

It is slow on purpose, and simple enough to check by eye. The Levenshtein distance is RapidFuzz's compiled one, because the
released code uses a compiled one too.
"""

from collections.abc import Callable, Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein

from stages.contract.roles import Role, token_roles
from stages.models.tokenizer import SegmentTokenizer
from stages.models.vocabulary import Vocabulary


def pair(source: Sequence[str], target: Sequence[str]) -> tuple[int, list[tuple[int, int]]]:
    """Find the cheapest path from the first pair to the last; ties go diagonal first, then k-1, then j-1.

    Returns:
        Cost of the path, and its pairs (k, j).
    """
    total: list[list[int]] = []
    for k, source_text in enumerate(source):
        row: list[int] = []
        for j, target_text in enumerate(target):
            cost = Levenshtein.distance(source_text, target_text)
            if k and j:
                cost += min(total[k - 1][j - 1], total[k - 1][j], row[j - 1])
            elif k:
                cost += total[k - 1][j]
            elif j:
                cost += row[j - 1]
            row.append(cost)
        total.append(row)
    k, j = len(source) - 1, len(target) - 1
    path = [(k, j)]
    while k or j:
        steps = [(k - 1, j - 1), (k - 1, j), (k, j - 1)]
        k, j = min((step for step in steps if min(step) >= 0), key=lambda step: total[step[0]][step[1]])
        path.append((k, j))
    return total[-1][-1], path[::-1]


def sinkhorn(
    cost: np.ndarray, a: np.ndarray, b: np.ndarray, *, epsilon: float, tolerance: float, max_iterations: int
) -> tuple[np.ndarray, bool]:
    """Scale rows and columns in turn; return (plan, converged). Each row's least cost is subtracted against underflow."""
    kernel = np.exp(-(cost - cost.min(axis=1, keepdims=True)) / epsilon)
    kernel = np.maximum(kernel, 1e-290)
    v = np.ones(len(b))
    for iteration in range(max_iterations):
        u = a / (kernel @ v)
        columns = kernel.T @ u
        if iteration % 10 == 0 and np.abs(columns * v - b).max() <= tolerance:
            return u[:, None] * kernel * v, True
        v = b / columns
    return u[:, None] * kernel * v, False


def sinkhorn_log(
    cost: np.ndarray, a: np.ndarray, b: np.ndarray, *, epsilon: float, tolerance: float, max_iterations: int
) -> tuple[np.ndarray, bool]:
    """Scale rows and columns in turn in the log domain, where no cost underflows; return (plan, converged)."""
    kernel, log_a, log_b = -cost / epsilon, np.log(a), np.log(b)
    g = np.zeros(len(b))
    for iteration in range(max_iterations):
        f = log_a - _log_sum_exp(kernel + g, axis=1)
        columns = _log_sum_exp(kernel + f[:, None], axis=0)
        if iteration % 10 == 0 and np.abs(np.exp(columns + g) - b).max() <= tolerance:
            return np.exp(kernel + f[:, None] + g), True
        g = log_b - columns
    return np.exp(kernel + f[:, None] + g), False


def _log_sum_exp(values: np.ndarray, *, axis: int) -> np.ndarray:
    largest = values.max(axis=axis, keepdims=True)
    return np.squeeze(largest, axis) + np.log(np.exp(values - largest).sum(axis=axis))


class PlainAligner:
    """Alignment with the ``paper`` preset, position by position.

    Args:
        target: the target's tokenizer.
        source: the source's.
        solver: ``sinkhorn`` or ``sinkhorn_log``.
    """

    def __init__(self, target: SegmentTokenizer, source: SegmentTokenizer, solver: Callable = sinkhorn) -> None:
        self._target = target
        self._source = source
        self._solver = solver
        self.num_unconverged = 0

    def align(self, target: dict, source: dict, *, top_k: int = 10) -> list[dict[int, float] | None]:
        """Align one segment.

        Args:
            target: a row of the target's logits table as Python objects.
            source: the source's.
            top_k: candidates of a distribution.

        Returns:
            For each target position the distribution over the target's vocabulary; None at the last.
        """
        _, path = pair(texts(self._source, source["token_ids"]), texts(self._target, target["token_ids"]))
        groups: dict[int, list[int]] = {}
        for k, j in path:
            groups.setdefault(j, []).append(k)
        result: list[dict[int, float] | None] = []
        target_roles = roles_of(self._target, target["token_ids"])
        source_roles = roles_of(self._source, source["token_ids"])
        for j in range(len(target["token_ids"]) - 1):
            context = target["byte_end"][j], target_roles[j]
            same = [k for k in groups[j] if (source["byte_end"][k], source_roles[k]) == context]
            k = (same or groups[j])[-1]
            has_candidates = source["topk_ids"][k] and target["topk_ids"][j]
            result.append(self._move(target, j, source, k, top_k) if has_candidates else None)
        return [*result, None]

    def _move(self, target: dict, j: int, source: dict, k: int, top_k: int) -> dict[int, float]:
        source_ids, target_ids = source["topk_ids"][k][:top_k], target["topk_ids"][j][:top_k]
        a = np.exp(np.array(source["topk_logprobs"][k][:top_k]))
        b = np.exp(np.array(target["topk_logprobs"][j][:top_k]))
        cost = np.array(
            [
                [
                    Levenshtein.distance(self._source.vocabulary.text(x), self._target.vocabulary.text(y))
                    for y in target_ids
                ]
                for x in source_ids
            ],
            float,
        )
        plan, converged = self._solver(
            cost, a / a.sum(), b / b.sum(), epsilon=1 / 30, tolerance=1e-5, max_iterations=2000
        )
        self.num_unconverged += not converged
        mass: dict[int, float] = {}
        for row in plan:
            best = int(row.argmax())
            mass[target_ids[best]] = mass.get(target_ids[best], 0.0) + float(row[best])
        total = sum(mass.values())
        return {token: part / total for token, part in mass.items()}


def roles_of(tokenizer: SegmentTokenizer, token_ids: Sequence[int]) -> list[int]:
    """Return the role of each token in the pairing."""
    vocabulary = tokenizer.vocabulary
    return token_roles(np.asarray(token_ids), prefix_id=tokenizer.prefix_id, eos_id=vocabulary.eos_id).tolist()


def _without_marker(vocabulary: Vocabulary, token_id: int) -> str:
    return vocabulary.text(token_id)[int(vocabulary.is_marked[token_id]) :]


def texts(tokenizer: SegmentTokenizer, token_ids: Sequence[int]) -> list[str]:
    """Return a segment's tokens as the pairing compares them."""
    return [
        _without_marker(tokenizer.vocabulary, token_id) if role == Role.TEXT else f"<{Role(role).name.lower()}>"
        for token_id, role in zip(token_ids, roles_of(tokenizer, token_ids), strict=True)
    ]
