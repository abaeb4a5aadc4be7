import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.fused_files import fused_table, save
from train.data.blocks import FusedBlocks
from train.data.feed import Feed, StepBatch
from train.data.schedule import Schedule
from train.distributed import Workers


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """37 blocks; the tokens of block i are i, and there are i % 4 + 1 of them."""
    tokens = [np.full(index % 4 + 1, index) for index in range(37)]
    return (save(fused_table(tokens, 400, seed=1), tmp_path_factory.mktemp("feed") / "blocks.parquet"),)


def worker(rank: int, size: int) -> Workers:
    return Workers(rank, size, torch.device("cpu"), mesh=None, control=None, storage=None)


def batches(
    files, schedule: Schedule, *, rank: int = 0, size: int = 1, start: int = 0, micro: int = 1
) -> list[StepBatch]:
    blocks = FusedBlocks(files, prefix_id=None, eos_id=None, with_distributions=True)
    with Feed(blocks, schedule, start, worker(rank, size), micro) as feed:
        return [feed.next()[0] for _ in range(start, schedule.num_steps)]


def indices(batch: StepBatch) -> list[int]:
    """Return the blocks of this worker, read off their tokens."""
    return [int(ids[0]) for part in batch.micro_batches if part.num_tokens for ids in part.ids]


@settings(max_examples=25)
@given(
    size=st.integers(1, 5),
    micro=st.integers(1, 3),
    factor=st.integers(1, 3),
    epochs=st.integers(1, 2),
    seed=st.integers(0, 9),
)
def test_workers_share_each_step_in_the_schedules_order(files, size, micro, factor, epochs, seed):
    schedule = Schedule(37, size * micro * factor, epochs, seed)
    shares = [batches(files, schedule, rank=rank, size=size, micro=micro) for rank in range(size)]
    alone = batches(files, schedule)
    for step, parts in enumerate(zip(*shares, strict=True)):
        wanted = schedule.blocks(step).tolist()
        assert [index for part in parts for index in indices(part)] == wanted == indices(alone[step])
        assert all(part.blocks == tuple(wanted) for part in parts)
        assert len({len(part.micro_batches) for part in parts}) == 1  # every pass is a collective operation
        for name in ("num_labels", "num_fused", "num_tokens"):
            assert sum(getattr(part, name) for part in parts) == getattr(alone[step], name)
        assert all(len(part.names) == len(part.micro_batches) for part in parts)


def test_counts_are_those_of_the_micro_batches(files):
    for batch in batches(files, Schedule(37, 8, 1, 3), micro=3):
        labelled = sum(int((part.labels >= 0).sum()) for part in batch.micro_batches)
        fused = sum(int(part.targets.present.sum()) for part in batch.micro_batches)
        assert (batch.num_labels, batch.num_fused) == (labelled, fused)


def test_a_feed_that_starts_later_gives_the_same_steps(files):
    schedule = Schedule(37, 8, 2, 3)
    whole = batches(files, schedule)
    later = batches(files, schedule, start=7)
    assert [batch.blocks for batch in later] == [batch.blocks for batch in whole[7:]]
    assert [batch.step for batch in later] == list(range(7, 10))


def test_a_worker_without_blocks_has_passes_that_count_nothing(files):
    last = [batches(files, Schedule(37, 12, 1, 3), rank=rank, size=3)[-1] for rank in range(3)]
    assert [[part.num_tokens > 0 for part in batch.micro_batches] for batch in last] in (
        [[True], [False], [False]],
        [[False]] * 3,
    )
    assert [batch.num_tokens > 0 for batch in last] == [True, False, False]
    assert last[2].names == ((),)


def test_what_reading_raises_reaches_the_one_who_trains(files):
    blocks = FusedBlocks(files, prefix_id=None, eos_id=None, with_distributions=True)
    with Feed(blocks, Schedule(40, 40, 1, 3), 0, worker(0, 1), 1) as feed, pytest.raises(IndexError, match="no block"):
        feed.next()


def test_the_thread_ends_with_the_feed(files):
    before = threading.active_count()
    blocks = FusedBlocks(files, prefix_id=None, eos_id=None, with_distributions=True)
    with Feed(blocks, Schedule(37, 1, 9, 3), 0, worker(0, 1), 1) as feed:
        feed.next()
    assert threading.active_count() == before


def test_for_a_gpu_every_tensor_is_pinned_and_copied_without_waiting(files, monkeypatch):
    pinned, copies = set(), []

    def pin(tensor):
        pinned.add(tensor.data_ptr())
        return tensor

    blocks = FusedBlocks(files, prefix_id=None, eos_id=None, with_distributions=True, isolate_documents=True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    workers = Workers(0, 1, torch.device("cuda"), mesh=None, control=None, storage=None)
    with Feed(blocks, Schedule(37, 4, 1, 3), 0, workers, 2) as feed:
        [part, *_] = feed.next()[0].micro_batches
    targets = part.targets
    tensors = [part.ids, part.labels, part.position_ids, targets.ids, targets.probs, targets.tail_mass]
    tensors = [tensor for tensor in tensors if tensor is not None]
    assert len(tensors) >= 5
    assert {tensor.data_ptr() for tensor in tensors} <= pinned
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **how: copies.append(how) or tensor)
    part.to(torch.device("cuda"))
    assert copies == [{"non_blocking": True}] * len(tensors)
