"""Packed documents that do not see each other: end to end in one row, in padded rows under a block mask, and each alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.contract.columns import SparseRows
from stages.models.devices import attention_choices
from stages.models.heads import split_head
from tests.benchmarks.loss_ways import random_rows
from tests.gpu.models import llama_config, random_model, relative_difference
from tests.gpu.report import Report, Setup
from train.config import TrainConfig
from train.data.blocks import Block, MicroBatch, collate, piece_positions
from train.model.isolation import check_isolation
from train.model.parallel import LossModel
from train.objective.loss import IGNORED

LAYERS = 2


@dataclass(frozen=True)
class Outcome:
    """What a way gives: the states of all tokens (N, H) in the documents' order, and the mean loss, nats."""

    states: Tensor
    loss: float


def run_isolation(report: Report, setup: Setup) -> None:
    """Compare three ways to give packed documents to a model, in the precision of training."""
    # On a CPU there is too little text to average bfloat16's rounding out of the loss.
    dtype = torch.bfloat16 if setup.device == "cuda" else torch.float32
    config = llama_config({**setup.size.llama, "num_hidden_layers": LAYERS})
    blocks = _blocks(setup.size.document_lengths, config.vocab_size)
    model = random_model(config, device=setup.device, dtype=dtype, attention="sdpa")
    check_isolation(model)
    alone = _alone(model, blocks, setup.device)
    _compare(report, "block_mask", _packed(model, collate(blocks), setup.device), alone)
    flat = collate(blocks, flatten=True)
    _compare(report, "flattened_block_mask", _packed(model, flat, setup.device), alone)
    # How much a neighbour matters, so that one can see that the limits are far below it.
    seen = collate([_joined_documents(block) for block in blocks])
    leaking = _packed(model, seen, setup.device)
    report.add("without_isolation_state_difference", relative_difference(leaking.states, alone.states), ">= 0.1")
    del model
    if setup.device != "cuda":
        report.unavailable("flattened_varlen", "FlashAttention's varlen kernel needs a GPU")
    elif attention_choices("auto", torch.device(setup.device), half_precision=True)[0] != "flash_attention_2":
        report.unavailable("flattened_varlen", "FlashAttention 2 (the package flash_attn) cannot be used")
    else:
        model = random_model(config, device=setup.device, dtype=dtype, attention="flash_attention_2")
        check_isolation(model)
        _compare(report, "flattened_varlen", _packed(model, flat, setup.device), alone)


def _compare(report: Report, way: str, found: Outcome, alone: Outcome) -> None:
    report.add(f"{way}_state_difference", relative_difference(found.states, alone.states), "<= 5e-2")
    report.add(f"{way}_loss_difference", abs(found.loss - alone.loss), "<= 1e-3")


@torch.no_grad()
def _packed(model: Any, batch: MicroBatch, device: str) -> Outcome:
    """Run a batch; padding is left out of its states."""
    there = batch.to(torch.device(device))
    body, _ = split_head(model)
    states = body(there.ids, position_ids=there.position_ids)
    num_labels = int((batch.labels != IGNORED).sum())
    total = _loss(model)(there, clm_factor=0.5 / num_labels, fusion_factor=0.5 / batch.num_tokens)[0]
    return Outcome(states[there.ids != PADDING_ID].float().cpu(), float(total))


@torch.no_grad()
def _alone(model: Any, blocks: Sequence[Block], device: str) -> Outcome:
    """Run each document as a block of its own, without position ids."""
    body, _ = split_head(model)
    num_labels = sum(int((block.labels != IGNORED).sum()) for block in blocks)
    num_tokens = sum(len(block.ids) for block in blocks)
    states, loss = [], 0.0
    for block in blocks:
        for document in _documents(block):
            batch = collate([document]).to(torch.device(device))
            states.append(body(batch.ids)[0].float().cpu())
            factors = {"clm_factor": 0.5 / num_labels, "fusion_factor": 0.5 / num_tokens}
            loss += float(_loss(model)(batch, **factors)[0])
    return Outcome(torch.cat(states), loss)


def _loss(model: Any) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return LossModel(model, TrainConfig(isolate_documents=True))


PADDING_ID = 0
"""What ``collate`` pads with; no document below holds it."""


def _blocks(lengths: Sequence[Sequence[int]], vocab_size: int) -> list[Block]:
    """Make blocks of several documents, with a distribution at every position."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    blocks = []
    for number, documents in enumerate(lengths):
        size = sum(documents)
        starts = np.cumsum([0, *documents[:-1]])
        ids = rng.integers(PADDING_ID + 1, vocab_size, size)
        labels = np.append(ids[1:], IGNORED)
        labels[starts[1:] - 1] = IGNORED
        rows = random_rows(size, vocab_size)
        fused = SparseRows(rows.ids.numpy().astype(np.int32), np.log(rows.probs.numpy() * 0.9))
        tail_mass = np.full(size, 0.1, np.float32)
        blocks.append(Block(f"block {number}", ids, labels, fused, tail_mass, piece_positions(starts, size)))
    return blocks


def _documents(block: Block) -> list[Block]:
    """Cut a block into its documents."""
    assert block.position_ids is not None
    assert block.fused is not None
    assert block.tail_mass is not None
    starts = np.flatnonzero(block.position_ids == 0)
    spans = [slice(start, end) for start, end in zip(starts, [*starts[1:], len(block.ids)], strict=True)]
    return [
        Block(
            block.name,
            block.ids[span],
            block.labels[span],
            SparseRows(block.fused.ids[span], block.fused.logprobs[span]),
            block.tail_mass[span],
        )
        for span in spans
    ]


def _joined_documents(block: Block) -> Block:
    """Return the block as one document."""
    positions = np.arange(len(block.ids))
    return Block(block.name, block.ids, block.labels, block.fused, block.tail_mass, positions)
