"""Whether the device computes what the CPU does: top-k logprobs, the loss and its gradients.

The CPU's side is written as plainly as can be, without the chunks of the code that is checked: whole logits, dense targets,
autograd; the gradients in float64. So the section says something on a CPU too.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.contract.columns import PAD_ID
from stages.logits.backends.base import Predictions
from stages.logits.backends.transformers import TransformersBackend
from stages.logits.config import LogitsConfig
from stages.models.windows import context_windows
from tests.benchmarks.loss_ways import random_rows
from tests.gpu.models import UNUSED, copied_model, model_config, random_model, relative_difference
from tests.gpu.report import Report, Setup
from tests.train.dense_loss import dense_sums
from train.config import TrainConfig
from train.data.blocks import MicroBatch
from train.model.parallel import LossModel
from train.objective.divergence import Divergence, SparseTargets
from train.objective.loss import IGNORED

TOP_K = 10
NEAR_TIE = 3e-5
"""Ids whose logprobs are closer than this may change places: float32 sums differ by as much from device to device."""
DIVERGENCES: tuple[Divergence, ...] = ("forward-kl", "reverse-kl")
CLM_FACTOR, FUSION_FACTOR = 0.02, 0.01


@dataclass(frozen=True)
class Rows:
    """Top-k rows of P positions: ids (P, k), logprobs (P, k), and the gold token's logprob (P,), NaN at sequences' ends."""

    ids: np.ndarray
    logprobs: np.ndarray
    gold: np.ndarray

    @classmethod
    def of(cls, predictions: Predictions) -> "Rows":
        """Take what a backend gives."""
        return cls(predictions.topk_ids, predictions.topk_logprobs, predictions.gold_logprob)

    @property
    def nll(self) -> float:
        """Mean over the gold tokens, nats."""
        return -float(np.nanmean(self.gold.astype(np.float64)))


def run_exactness(report: Report, setup: Setup) -> None:
    """Compare two small models on the device with themselves on the CPU."""
    for model_type, settings in setup.size.exact_shapes.items():
        config = model_config(model_type, {**settings, "num_hidden_layers": 2})
        model = random_model(config, device="cpu", dtype=torch.float32, attention="sdpa")
        name = model_type.removesuffix("_text")
        _compare_rows(report, setup, name, model)
        _compare_gradients(report, setup, name, model)


def random_sequences(lengths: Sequence[int], vocab_size: int) -> list[np.ndarray]:
    """Draw token ids."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, length).astype(np.int32) for length in lengths]


def backend_of(model: Any, *, device: str, dtype: str, **settings: Any) -> TransformersBackend:
    """Return the transformers backend of a model in memory; every id is valid."""
    config = LogitsConfig(top_k=TOP_K, dtype=dtype, device=device, backend="transformers", **settings)
    return TransformersBackend(config, UNUSED, num_valid=model.config.vocab_size, loaded=model)


def predict(backend: TransformersBackend, sequences: Sequence[np.ndarray]) -> Predictions:
    """Run sequences, in windows where they are too long."""
    return backend.predict(sequences, [context_windows(len(ids), max_length=backend.max_length) for ids in sequences])


def same_share(found: Rows, expected: Rows) -> float:
    """Return the share of top-k entries whose ids agree, in their order but for ties.

    An id at another rank agrees where the expected logprobs of the two ranks are nearer than ``NEAR_TIE``. One that the
    expected row does not list never does.
    """
    is_same = (found.ids[:, :, None] == expected.ids[:, None, :]) & (
        np.abs(expected.logprobs[:, :, None] - expected.logprobs[:, None, :]) <= NEAR_TIE
    )
    return float(is_same.any(axis=2).mean())


@torch.no_grad()
def plain_rows(model: Any, sequences: Sequence[np.ndarray]) -> Rows:
    """Compute top-k rows from whole logits, sequence by sequence."""
    rows = []
    for ids in sequences:
        tokens = torch.from_numpy(ids.astype(np.int64))[None]
        logprobs = model(input_ids=tokens, use_cache=False).logits[0].float().log_softmax(-1)
        top = logprobs.topk(TOP_K)
        gold = torch.full((len(ids),), torch.nan)
        gold[:-1] = logprobs[:-1].gather(1, tokens[0, 1:, None])[:, 0]
        rows.append((top.indices, top.values, gold))
    return Rows(*(torch.cat(column).numpy() for column in zip(*rows, strict=True)))


def _compare_rows(report: Report, setup: Setup, name: str, model: Any) -> None:
    sequences = random_sequences(setup.size.exact_lengths, model.config.vocab_size)
    expected = plain_rows(model, sequences)
    for dtype in ("float32", "bfloat16"):
        there = copied_model(model, device=setup.device, dtype=getattr(torch, dtype))
        backend = backend_of(
            there, device=setup.device, dtype=dtype, batch_tokens=max(setup.size.exact_lengths), chunk_positions=24
        )
        found = Rows.of(predict(backend, sequences))
        is_exact = dtype == "float32"
        report.add(f"{name}_top10_same_{dtype}", same_share(found, expected), ">= 0.9999" if is_exact else None)
        difference = float(np.abs(found.logprobs - expected.logprobs).max())
        report.add(f"{name}_logprob_difference_{dtype}", difference, "<= 1e-4" if is_exact else None)
        report.add(
            f"{name}_nll_difference_{dtype}", abs(found.nll - expected.nll), "<= 1e-4" if is_exact else "<= 1e-2"
        )


def _compare_gradients(report: Report, setup: Setup, name: str, model: Any) -> None:
    batch = _batch(setup.size.gradient_shape, model.config.vocab_size)
    assert batch.targets is not None
    there = copied_model(model, device=setup.device, dtype=torch.float32).train()
    plain = copy.deepcopy(model).double().train()
    num_positions = batch.labels.numel()
    for divergence, has_tail in product(DIVERGENCES, (False, True)):
        tail = torch.full((num_positions,), 0.1) if has_tail else None
        probs = batch.targets.probs * (0.9 if has_tail else 1.0)
        targets = SparseTargets(batch.targets.ids, probs, tail)
        config = TrainConfig(fusion_loss=divergence, autocast="float32", chunk_positions=10)
        there.zero_grad(set_to_none=True)
        plain.zero_grad(set_to_none=True)
        part = MicroBatch(batch.ids, batch.labels, targets, batch.num_tokens).to(torch.device(setup.device))
        total, _, _ = LossModel(there, config)(part, clm_factor=CLM_FACTOR, fusion_factor=FUSION_FACTOR)
        total.backward()
        logits = plain(input_ids=batch.ids, use_cache=False).logits.flatten(0, 1)
        sums = dense_sums(logits, batch.labels.flatten(), targets, divergence, 1.0)
        expected = CLM_FACTOR * sums[0] + FUSION_FACTOR * sums[1]
        expected.backward()
        suffix = f"{divergence}_{'with' if has_tail else 'without'}_tail"
        report.add(f"{name}_loss_difference_{suffix}", relative_difference(total, expected), "<= 1e-4")
        pairs = zip(there.parameters(), plain.parameters(), strict=True)
        worst = max(relative_difference(_gradient(one), _gradient(other)) for one, other in pairs)
        report.add(f"{name}_gradient_difference_{suffix}", worst, "<= 1e-4")


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise ValueError(f"a parameter of shape {tuple(parameter.shape)} has no gradient")
    return parameter.grad


def _batch(shape: tuple[int, int], vocab_size: int) -> MicroBatch:
    """A batch on the CPU; some positions have no fused distribution, and some rows are shorter than others."""
    torch.manual_seed(0)
    ids = torch.randint(vocab_size, shape)
    labels = torch.cat([ids[:, 1:], torch.full((shape[0], 1), IGNORED)], dim=1)
    rows = random_rows(ids.numel(), vocab_size)
    rows.ids[1::3, -4:], rows.probs[1::3, -4:] = PAD_ID, 0.0
    rows.ids[::7], rows.probs[::7] = PAD_ID, 0.0
    mass = rows.probs.sum(dim=1, keepdim=True)
    rows.probs.div_(mass.where(mass > 0, torch.ones_like(mass)))
    return MicroBatch(ids, labels, rows, ids.numel())
