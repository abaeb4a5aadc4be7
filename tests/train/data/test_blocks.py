import numpy as np
import pyarrow as pa
import pytest
import torch

from stages.contract.columns import PAD_ID, list_row, sparse_row
from tests.train.fused_files import fused_table, replaced_pieces, save, text_blocks
from train.data import blocks
from train.data.blocks import FusedBlocks, collate, epoch_order
from train.data.schedule import Schedule
from train.job import FusedFile
from train.objective.loss import IGNORED

V = 50


@pytest.fixture
def blocks_of_ids() -> list[np.ndarray]:
    return text_blocks(np.arange(3, 40), 8, 7)


def open_files(
    *files: FusedFile, prefix_id: int | None = None, eos_id: int | None = None, with_distributions: bool = True
) -> FusedBlocks:
    return FusedBlocks(files, prefix_id=prefix_id, eos_id=eos_id, with_distributions=with_distributions)


def test_blocks_come_by_index_over_all_files_and_row_groups(tmp_path, blocks_of_ids):
    one, two = fused_table(blocks_of_ids[:4], V), fused_table(blocks_of_ids[4:], V, seed=1)
    opened = open_files(save(one, tmp_path / "a.parquet", row_group_size=3), save(two, tmp_path / "b.parquet"))
    assert len(opened) == 7
    for index in [6, 0, 3, 2, 5, 4, 1]:
        block = opened.block(index)
        table, row = (one, index) if index < 4 else (two, index - 4)
        assert block.name == ("a.parquet" if index < 4 else "b.parquet") + f":{row}"
        np.testing.assert_array_equal(block.ids, blocks_of_ids[index])
        np.testing.assert_array_equal(block.fused.ids, sparse_row(table, row).ids)
        np.testing.assert_array_equal(block.fused.logprobs, sparse_row(table, row).logprobs)
    with pytest.raises(IndexError, match="no block 7"):
        opened.block(7)


def test_a_small_cache_reads_the_same_blocks(tmp_path, blocks_of_ids, monkeypatch):
    monkeypatch.setattr(blocks, "CACHE_BYTES", 1)
    opened = open_files(save(fused_table(blocks_of_ids, V), tmp_path / "a.parquet", row_group_size=2))
    for index in [5, 0, 6, 1]:
        np.testing.assert_array_equal(opened.block(index).ids, blocks_of_ids[index])


def test_tail_mass_is_read_where_the_table_has_it(tmp_path, blocks_of_ids):
    table = fused_table(blocks_of_ids, V, tail="bucket")
    opened = open_files(save(table, tmp_path / "a.parquet"))
    np.testing.assert_array_equal(opened.block(2).tail_mass, list_row(table, "tail_mass", 2))
    assert collate([opened.block(0), opened.block(6)]).targets.tail_mass.shape == (16,)


def test_only_tokens_are_read_when_distributions_are_not_needed(tmp_path, blocks_of_ids):
    table = fused_table(blocks_of_ids, V).drop_columns(["topk_ids", "topk_logprobs"])
    opened = open_files(save(table, tmp_path / "a.parquet"), with_distributions=False)
    assert opened.block(0).fused is None
    assert collate([opened.block(0)]).targets is None


def test_labels_are_the_next_tokens_and_end_with_the_block(tmp_path, blocks_of_ids):
    block = open_files(save(fused_table(blocks_of_ids, V), tmp_path / "a.parquet")).block(1)
    assert block.labels.tolist() == [*blocks_of_ids[1][1:], IGNORED]


def test_what_follows_a_piece_is_a_label_where_the_text_goes_on_or_a_document_follows_an_ended_one(tmp_path):
    bos, eos = 1, 2
    ids = np.array([bos, 5, 6, bos, 7, eos, bos, 9, bos, 8])
    table = fused_table([ids], V)
    pieces = {  # a document, its continuation and end, another document, and a third one before that has ended
        "piece_start": np.array([0, 3, 6, 8]),
        "piece_doc_id": np.array([0, 0, 1, 2]),
        "piece_segment": np.array([0, 1, 0, 0]),
        "piece_offset": np.array([0, 0, 0, 0]),
    }
    file = save(replaced_pieces(table, pieces), tmp_path / "a.parquet")

    def labels(prefix_id: int | None, eos_id: int | None) -> list[int]:
        return open_files(file, prefix_id=prefix_id, eos_id=eos_id).block(0).labels.tolist()

    assert labels(bos, eos) == [5, 6, IGNORED, 7, eos, bos, 9, IGNORED, 8, IGNORED]
    assert labels(None, eos) == [5, 6, bos, 7, eos, bos, 9, IGNORED, 8, IGNORED]  # the text goes on
    # EOS before every text: that a second one follows the first is nothing to learn.
    assert labels(eos, eos) == [5, 6, IGNORED, 7, eos, IGNORED, 9, IGNORED, 8, IGNORED]
    assert labels(bos, None) == [5, 6, IGNORED, 7, eos, bos, 9, bos, 8, IGNORED]


def test_a_file_that_is_not_the_committed_one_is_refused(tmp_path, blocks_of_ids):
    file = save(fused_table(blocks_of_ids, V), tmp_path / "a.parquet")
    raw = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(raw[:-20] + bytes([raw[-20] ^ 1]) + raw[-19:])
    with pytest.raises(ValueError, match="verify RUN --repair`, then `make fuse`"):
        open_files(file)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(ValueError, match="is missing"):
        open_files(file)


def test_files_without_blocks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no training block"):
        open_files(save(fused_table([], V), tmp_path / "a.parquet"))


def test_a_file_behind_a_url_is_read(tmp_path, blocks_of_ids):
    file = save(fused_table(blocks_of_ids, V), tmp_path / "a.parquet")
    opened = open_files(FusedFile(f"file://{file.path}", file.sha256))
    np.testing.assert_array_equal(opened.block(3).ids, blocks_of_ids[3])


def test_collate_pads_on_the_right_and_padding_counts_nowhere(tmp_path, blocks_of_ids):
    opened = open_files(save(fused_table(blocks_of_ids, V), tmp_path / "a.parquet"))
    blocks = [opened.block(0), opened.block(6)]
    batch = collate(blocks)
    assert batch.ids.shape == batch.labels.shape == (2, 8)
    assert batch.num_tokens == 12
    assert batch.ids[1, 4:].tolist() == [0] * 4
    assert batch.labels[1, 3:].tolist() == [IGNORED] * 5
    assert not batch.targets.present[12:].any()
    width = blocks[1].fused.ids.shape[1]
    np.testing.assert_array_equal(batch.targets.ids[8:12, :width], blocks[1].fused.ids)
    torch.testing.assert_close(batch.targets.probs[8:12, :width].log(), torch.tensor(blocks[1].fused.logprobs))
    assert (batch.targets.ids[:, width:] == PAD_ID).all() or width == batch.targets.ids.shape[1]


def test_order_is_a_permutation_that_seed_and_epoch_decide():
    order = epoch_order(100, seed=42, epoch=0)
    assert sorted(order) == list(range(100))
    np.testing.assert_array_equal(order, epoch_order(100, seed=42, epoch=0))
    assert not np.array_equal(order, epoch_order(100, seed=42, epoch=1))
    assert not np.array_equal(order, epoch_order(100, seed=43, epoch=0))
    assert epoch_order(8, seed=42, epoch=0).tolist() == [
        3,
        4,
        2,
        7,
        6,
        1,
        5,
        0,
    ]  # of every numpy: a resumed run needs it


@pytest.mark.parametrize(("num_blocks", "batch_size", "num_epochs"), [(10, 4, 3), (8, 4, 2), (3, 10, 1)])
def test_every_epoch_sees_every_block_once(num_blocks, batch_size, num_epochs):
    schedule = Schedule(num_blocks, batch_size, num_epochs, seed=1)
    seen = 0
    for epoch in range(num_epochs):
        steps = [step for step in range(schedule.num_steps) if schedule.epoch(step) == epoch]
        batches = [schedule.blocks(step) for step in steps]
        assert sorted(np.concatenate(batches)) == list(range(num_blocks))
        for step, batch in zip(steps, batches, strict=True):
            assert schedule.samples_before(step) == seen
            seen += len(batch)
    assert schedule.samples_before(schedule.num_steps) == seen == num_blocks * num_epochs


def test_arrow_table_of_blocks_matches_the_schema(blocks_of_ids):
    table = fused_table(blocks_of_ids, V, tail="bucket")
    assert isinstance(table, pa.Table)
    table.validate(full=True)


# --- conversations --------------------------------------------------------------------------------------------------------


def conversations_file(tmp_path, ids: np.ndarray, is_trained: np.ndarray, starts: list[int]) -> FusedFile:
    """Return one block of packed conversations."""
    table = fused_table([ids], V)
    zeros = np.zeros(len(starts), np.int64)
    pieces = {"piece_start": np.array(starts), "piece_doc_id": np.arange(len(starts))}
    table = replaced_pieces(table, {**pieces, "piece_segment": zeros, "piece_offset": zeros})
    column = pa.array([is_trained.tolist()], pa.list_(pa.bool_()))
    return save(
        table.append_column(pa.field("is_trained", column.type, nullable=False), column), tmp_path / "a.parquet"
    )


def test_labels_of_conversations_are_the_learnt_tokens(tmp_path):
    ids = np.array([3, 4, 10, 11, 1, 3, 5, 12, 1, 3, 5, 13, 14, 1])
    # A question that is not learnt and its answer; then an answer alone, whose first template token follows an end of turn.
    is_trained = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1], bool)
    file = conversations_file(tmp_path, ids, is_trained, [0, 9])
    opened = FusedBlocks([file], prefix_id=3, eos_id=1, with_distributions=True, isolate_documents=True)
    block = opened.block(0)
    skipped = [IGNORED] * 6
    assert block.labels.tolist() == [*skipped, 12, 1, IGNORED, IGNORED, 13, 14, 1, IGNORED]
    assert block.position_ids.tolist() == [*range(9), *range(5)]
    flat = collate([block, block], flatten=True)
    assert flat.labels[0].tolist() == [*block.labels, *block.labels]
    assert flat.position_ids[0].tolist() == [*range(9), *range(5), *range(9), *range(5)]


def test_a_token_that_is_learnt_by_mistake_at_the_start_of_a_conversation_is_no_label(tmp_path):
    """Nothing of the conversation stands before it: another one does."""
    ids, is_trained = np.arange(3, 9), np.ones(6, bool)
    file = conversations_file(tmp_path, ids, is_trained, [0, 3])
    opened = FusedBlocks([file], prefix_id=None, eos_id=None, with_distributions=False, isolate_documents=True)
    assert opened.block(0).labels.tolist() == [4, 5, IGNORED, 7, 8, IGNORED]


def test_conversations_that_see_each_other_are_refused(tmp_path):
    file = conversations_file(tmp_path, np.arange(3, 9), np.ones(6, bool), [0, 3])
    with pytest.raises(ValueError, match=r"a\.parquet hold conversations, but train\.isolate_documents = false"):
        open_files(file)
