import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.models.config import ModelConfig, load_model
from tests.tiny_models import save_model
from tests.train.conftest import job_in
from tests.train.fused_files import fused_table, save
from train import loop
from train.checkpoints.folders import committed_steps
from train.data.blocks import FusedBlocks
from train.job import FusedFile, StepRecord, TrainJob
from train.loop import train
from train.objective.loss import IGNORED
from train.run_log import read_log


def weights(folder: str) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())


def assert_same_weights(one: str, other: str) -> None:
    found, expected = weights(one), weights(other)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


class InterruptedError_(Exception):
    """Stands for whatever ends a process."""


def interrupt_after(step: int):
    def on_step(record: StepRecord) -> None:
        if record.step == step:
            raise InterruptedError_

    return on_step


def without_timing(records: list[StepRecord]) -> list[StepRecord]:
    return [replace(record, tokens_per_second=0.0, data_wait_share=0.0, peak_memory_gb=0.0) for record in records]


def test_training_lowers_both_losses(tiny_job, tmp_path):
    job = job_in(tiny_job, tmp_path, num_epochs=8, batch_size=2)
    result = train(job)
    records = read_log(tmp_path)
    assert [record.step for record in records] == list(range(1, 49))
    first, last = records[:6], records[-6:]
    for name in ("loss", "loss_clm", "loss_fusion"):
        assert np.mean([getattr(r, name) for r in last]) < np.mean([getattr(r, name) for r in first]) - 0.3
    assert records[0].loss == pytest.approx(0.5 * records[0].loss_clm + 0.5 * records[0].loss_fusion)
    assert result.num_steps == 48
    assert result.num_tokens == records[-1].num_tokens == 8 * (16 * 11 - 8)
    assert result.loss == records[-1].loss


def test_first_loss_is_the_models_own(tiny_job, tmp_path):
    """With lambda = 1 and one step over everything, the loss is the plain cross-entropy of the untrained model."""
    train(job_in(tiny_job, tmp_path, **{"lambda": 1.0}, batch_size=100, micro_batch_size=5, num_epochs=1))
    record = read_log(tmp_path)[0]
    model = load_model(tiny_job.model, dtype="float32", attention=("sdpa",), device="cpu")
    blocks = FusedBlocks(tiny_job.files, prefix_id=None, eos_id=None, with_distributions=False)
    total, count = 0.0, 0
    with torch.no_grad():
        for index in range(len(blocks)):
            ids = torch.tensor(blocks.block(index).ids)[None]
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert record.loss_fusion is None
    assert record.loss == record.loss_clm == pytest.approx(total / count, rel=1e-5)


def test_lambda_one_needs_no_distributions(tiny_job, tmp_path):
    import hashlib

    files = []
    for file in tiny_job.files:
        path = tmp_path / Path(file.path).name
        table = pq.read_table(file.path).drop_columns(["topk_ids", "topk_logprobs", "tail_mass", "chosen"])
        pq.write_table(table, path)
        files.append(FusedFile(str(path), hashlib.sha256(path.read_bytes()).hexdigest()))
    plain = train(replace(job_in(tiny_job, tmp_path / "plain", **{"lambda": 1.0}), files=tuple(files)))
    full = train(job_in(tiny_job, tmp_path / "full", **{"lambda": 1.0}))
    assert_same_weights(plain.model_folder, full.model_folder)


def test_micro_batch_size_does_not_change_the_result(tiny_job, tmp_path):
    one = train(job_in(tiny_job, tmp_path / "one", micro_batch_size=1))
    four = train(job_in(tiny_job, tmp_path / "four", micro_batch_size=4))
    for a, b in zip(read_log(tmp_path / "one"), read_log(tmp_path / "four"), strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.loss_fusion == pytest.approx(b.loss_fusion, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
    # AdamW's step does not shrink with the gradient, so where that is all but zero its rounding shows in full.
    other = weights(four.model_folder)
    for name, value in weights(one.model_folder).items():
        assert (value - other[name]).abs().mean() < 1e-6, name


def test_gradient_checkpointing_and_chunks_do_not_change_the_result(tiny_job, tmp_path):
    plain = train(job_in(tiny_job, tmp_path / "plain", num_epochs=1))
    other = train(job_in(tiny_job, tmp_path / "other", num_epochs=1, gradient_checkpointing=True, chunk_positions=5))
    assert plain.loss == pytest.approx(other.loss, rel=1e-5)


def test_bfloat16_autocast_stays_near_float32(tiny_job, tmp_path):
    full = train(job_in(tiny_job, tmp_path / "full", num_epochs=1))
    half = train(job_in(tiny_job, tmp_path / "half", num_epochs=1, autocast="bfloat16"))
    assert half.loss == pytest.approx(full.loss, rel=2e-2)
    assert all(value.dtype == torch.float32 for value in weights(half.model_folder).values())


@pytest.mark.parametrize("interrupted_at", [1, 2, 3, 5, 6])
def test_an_interrupted_run_ends_as_an_undisturbed_one(tiny_job, tmp_path, interrupted_at, undisturbed):
    job = job_in(tiny_job, tmp_path)
    with pytest.raises(InterruptedError_):
        train(job, on_step=interrupt_after(interrupted_at))
    steps = []
    result = train(job, on_step=lambda record: steps.append(record.step))
    resumed_from = interrupted_at // 2 * 2
    assert steps == list(range(resumed_from + 1, 7))
    assert without_timing(read_log(tmp_path)) == without_timing(read_log(Path(undisturbed.output)))
    assert_same_weights(result.model_folder, str(Path(undisturbed.output) / "model"))


@pytest.fixture(scope="module")
def undisturbed(tiny_job, tmp_path_factory) -> TrainJob:
    torch.set_num_threads(1)
    job = job_in(tiny_job, tmp_path_factory.mktemp("undisturbed"))
    train(job)
    return job


def test_logs_hold_each_step_once_after_a_restart(tiny_job, tmp_path):
    job = job_in(tiny_job, tmp_path)
    with pytest.raises(InterruptedError_):
        train(job, on_step=interrupt_after(3))
    train(job)
    assert [record.step for record in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss",
        "loss_clm",
        "loss_fusion",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "data_wait_share",
        "lambda",
        "peak_memory_gb",
    }
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_a_half_written_last_log_line_is_skipped(tiny_job, tmp_path):
    job = job_in(tiny_job, tmp_path)
    with pytest.raises(InterruptedError_):
        train(job, on_step=interrupt_after(2))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "num_st')
    train(job)
    assert [record.step for record in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_export_loads_and_the_manifest_names_its_files(undisturbed):
    output = Path(undisturbed.output)
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["fingerprint"] == undisturbed.fingerprint
    assert manifest["result"]["num_steps"] == 6
    names = {path.name for path in (output / "model").iterdir()}
    assert names == {*manifest["model_files"], "README.md"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    generated = model.generate(**tokenizer("The quick", return_tensors="pt"), max_new_tokens=3, min_new_tokens=3)
    assert generated.shape[1] > 3
    card = (output / "model" / "README.md").read_text()
    assert all(part in card for part in ("tiny", "source-one", "source-two", undisturbed.fingerprint))
    assert not list(output.glob(".model*"))


def test_a_finished_job_has_nothing_to_do(undisturbed, monkeypatch):
    monkeypatch.setattr(loop, "load_model", None)  # would fail if anything were loaded
    again = train(undisturbed)
    assert again.was_done
    assert again.num_steps == 6


def test_a_finished_job_whose_model_was_removed_is_refused(tiny_job, tmp_path):
    job = job_in(tiny_job, tmp_path, num_epochs=1)
    result = train(job)
    (Path(result.model_folder) / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        train(job)


def test_another_jobs_output_is_refused(tiny_job, tmp_path, undisturbed):
    with pytest.raises(ValueError, match="another output folder"):
        train(replace(undisturbed, fingerprint="ffffffffffff"))
    job = job_in(tiny_job, tmp_path)
    with pytest.raises(InterruptedError_):
        train(job, on_step=interrupt_after(2))
    with pytest.raises(ValueError, match="fingerprint"):
        train(replace(job, fingerprint="ffffffffffff"))


def test_old_checkpoints_go_and_the_newest_stay(tiny_job, tmp_path):
    train(job_in(tiny_job, tmp_path, checkpoint_every_steps=1, keep_checkpoints=2))
    assert committed_steps(tmp_path) == [5, 6]
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


def test_a_changed_file_is_refused(tiny_job, tmp_path):
    wrong = replace(tiny_job.files[0], sha256="0" * 64)
    job = replace(job_in(tiny_job, tmp_path), files=(wrong, *tiny_job.files[1:]))
    with pytest.raises(ValueError, match="make fuse"):
        train(job)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": "s3://bucket/run"}, "local"),
        ({"files": ()}, "make fuse"),
    ],
)
def test_a_job_that_cannot_run_is_refused(tiny_job, change, message):
    with pytest.raises(ValueError, match=message):
        train(replace(tiny_job, **change))


def test_a_micro_batch_that_does_not_divide_the_batch_is_refused(tiny_job, tmp_path):
    with pytest.raises(ValueError, match="batch_size to 3 or 6, or choose"):
        train(job_in(tiny_job, tmp_path, batch_size=4, micro_batch_size=3))


def test_a_loss_that_is_not_finite_stops_and_names_the_blocks(tiny_job, tmp_path):
    with pytest.raises(FloatingPointError, match=r"shard-\d\.parquet:\d"):
        train(job_in(tiny_job, tmp_path, learning_rate=1e30, clip_norm=1e30))
    assert all(math.isfinite(record.loss) for record in read_log(tmp_path))


def test_a_last_block_of_one_token_is_a_step_without_effect(tiny_job, tmp_path):
    from tests.train.fused_files import fused_table, save

    file = save(fused_table([np.array([5])], 400), tmp_path / "one.parquet")
    result = train(replace(job_in(tiny_job, tmp_path / "out", num_epochs=1), files=(file,)))
    assert result.loss == 0.0
    assert result.loss_clm is None
    original = load_model(tiny_job.model, dtype="float32", attention=("sdpa",), device="cpu")
    for name, value in weights(result.model_folder).items():
        torch.testing.assert_close(value, original.get_parameter(name), rtol=0, atol=0)


def job_of_few_rows(tiny_job: TrainJob, folder: Path, *, blocks_rows: int, distributions_rows: int) -> TrainJob:
    """A model with 390 rows for 400 tokens, and blocks whose ids are below these numbers."""
    model = ModelConfig(name="few", path=save_model(folder / "few", vocab_padding=-10))
    rng = np.random.default_rng(0)
    blocks = [rng.integers(3, blocks_rows, 16) for _ in range(8)]
    blocks[0][3] = blocks_rows - 1
    file = save(fused_table(blocks, distributions_rows, seed=1), folder / "fused.parquet")
    return replace(job_in(tiny_job, folder / "out", num_epochs=1), model=model, files=(file,))


def test_tokens_without_a_row_are_accepted_where_no_block_holds_one(tiny_job, tmp_path):
    result = train(job_of_few_rows(tiny_job, tmp_path, blocks_rows=390, distributions_rows=390))
    assert weights(result.model_folder)["model.embed_tokens.weight"].shape[0] == 390


@pytest.mark.parametrize(("blocks_rows", "distributions_rows"), [(400, 390), (390, 400)])
def test_blocks_with_a_token_that_the_model_has_no_row_for_are_refused(
    tiny_job, tmp_path, blocks_rows, distributions_rows
):
    job = job_of_few_rows(tiny_job, tmp_path, blocks_rows=blocks_rows, distributions_rows=distributions_rows)
    with pytest.raises(
        ValueError, match=r"model few: the training blocks hold token 39\d, and the model's embedding has 390"
    ):
        train(job)


def test_conversations_that_are_not_isolated_are_refused_before_anything_is_read(tiny_job, tmp_path):
    model = tiny_job.model.model_copy(update={"reads_conversations": True})
    job = replace(job_in(tiny_job, tmp_path), model=model, files=(FusedFile("nowhere", "0"),))
    with pytest.raises(ValueError, match="lets the conversations of a block see each other"):
        train(job)


def test_an_interrupted_run_on_conversations_ends_as_an_undisturbed_one(tiny_job, tmp_path):
    """Blocks of two conversations, of which every third token is learnt."""
    files = []
    for number, file in enumerate(tiny_job.files):
        table = pq.read_table(file.path)
        sizes = [len(ids) for ids in table["token_ids"]]
        for name, values in (
            ("piece_start", [[0, size // 2] for size in sizes]),
            ("piece_doc_id", [[2 * row, 2 * row + 1] for row in range(len(sizes))]),
            ("piece_segment", [[0, 0] for _ in sizes]),
            ("piece_offset", [[0, 0] for _ in sizes]),
        ):
            index = table.schema.get_field_index(name)
            table = table.set_column(index, table.schema.field(name), pa.array(values, table.schema.field(name).type))
        learnt = pa.array([[token % 3 == 0 for token in range(size)] for size in sizes], pa.list_(pa.bool_()))
        table = table.append_column(pa.field("is_trained", learnt.type, nullable=False), learnt)
        files.append(save(table, tmp_path / f"shard-{number}.parquet"))
    model = tiny_job.model.model_copy(update={"reads_conversations": True})
    # The tokenizer has no chat template; which tokens are learnt stands in the files alone.
    model = model.model_copy(update={"chat_template": "plain"})
    job = replace(tiny_job, model=model, files=tuple(files))
    whole = train(job_in(job, tmp_path / "whole", isolate_documents=True))
    disturbed = job_in(job, tmp_path / "disturbed", isolate_documents=True)
    with pytest.raises(InterruptedError_):
        train(disturbed, on_step=interrupt_after(3))
    assert_same_weights(train(disturbed).model_folder, whole.model_folder)
    # Gold tokens and fused rows count at learnt positions alone, and none is learnt from another conversation.
    first = read_log(tmp_path / "whole")[0]
    assert first.loss_clm > 0
    blocks = FusedBlocks(files, prefix_id=None, eos_id=None, with_distributions=True, isolate_documents=True)
    labels = [blocks.block(index).labels for index in range(len(blocks))]
    assert sum(int((part != IGNORED).sum()) for part in labels) == sum(
        sum(token % 3 == 0 and token not in (0, len(part) // 2) for token in range(len(part))) for part in labels
    )
