"""Training on several processes, killed, resumed on other numbers of workers: always the same losses."""

import json
import math
import signal
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from stages.contract.columns import list_column
from stages.models.config import ModelConfig
from tests.tiny_models import save_model
from tests.train.conftest import job_in
from tests.train.fused_files import save
from tests.train.test_loop import weights
from tests.train.workers import kill, printed, start_workers, train_on, wait, wait_until
from train.checkpoints.folders import committed_steps
from train.job import TrainJob
from train.loop import train
from train.run_log import read_log


@pytest.fixture(scope="module")
def tied_job(tiny_job, tmp_path_factory) -> TrainJob:
    """Provide the tiny job on a Gemma-3: tied embeddings, scaled inputs, sliding windows."""
    folder = save_model(tmp_path_factory.mktemp("tied") / "gemma", architecture="gemma3", tokenizer_family="unigram")
    return replace(tiny_job, model=ModelConfig(name="gemma", path=folder))


@pytest.fixture(scope="module")
def undisturbed(tiny_job, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("undisturbed")
    train(job_in(tiny_job, output))
    return output


def assert_same_run(found: Path, expected: Path, *, relative: float) -> None:
    """Step by step: the same blocks, losses and gradient norms; in the end the same weights, as far as AdamW allows."""
    records, others = read_log(found), read_log(expected)
    assert [record.step for record in records] == [record.step for record in others]
    for one, other in zip(records, others, strict=True):
        assert one.blocks == other.blocks
        assert one.num_tokens == other.num_tokens
        for name in ("loss", "loss_clm", "loss_fusion", "grad_norm", "learning_rate"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=relative), (one.step, name)
    last = weights(str(expected / "model"))
    for name, value in weights(str(found / "model")).items():
        # AdamW's step does not shrink with the gradient, so where that is all but zero its rounding shows in full.
        assert (value - last[name]).abs().mean() < 1e-5, name


@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 2, "gradient_checkpointing": True}])
def test_two_workers_match_one_process(tiny_job, tmp_path, undisturbed, settings):
    train_on(job_in(tiny_job, tmp_path / "run", **settings), tmp_path, num_workers=2)
    assert_same_run(tmp_path / "run", undisturbed, relative=1e-4)


def test_two_workers_match_one_process_with_tied_embeddings(tied_job, tmp_path):
    train(job_in(tied_job, tmp_path / "one"))
    train_on(job_in(tied_job, tmp_path / "two", reshard_after_forward=False), tmp_path, num_workers=2)
    assert_same_run(tmp_path / "two", tmp_path / "one", relative=1e-4)
    exported = json.loads((tmp_path / "two" / "manifest.json").read_text())["model_files"]
    assert exported.keys() == json.loads((tmp_path / "one" / "manifest.json").read_text())["model_files"].keys()


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_checkpoint_is_resumed_on_another_number_of_workers(tiny_job, tmp_path, undisturbed, before, after):
    job = job_in(tiny_job, tmp_path / "run")
    processes = start_workers(job, tmp_path / "before", num_workers=before, pause_after=3)
    wait_until(lambda: len(list((tmp_path / "run").glob("paused-*"))) == before, processes)
    assert committed_steps(tmp_path / "run") in ([], [2])
    wait_until(lambda: committed_steps(tmp_path / "run") == [2], processes)
    kill(processes)
    train_on(job, tmp_path / "after", num_workers=after)
    assert "2 of 6 steps done" in printed(tmp_path / "after")
    assert_same_run(tmp_path / "run", undisturbed, relative=1e-4)


def test_a_killed_worker_ends_the_others_and_the_job_resumes(tiny_job, tmp_path, undisturbed):
    job = job_in(tiny_job, tmp_path / "run", checkpoint_every_steps=1)
    processes = start_workers(job, tmp_path / "before", num_workers=2, pause_after=4, pause_seconds=1)
    wait_until(lambda: len(list((tmp_path / "run").glob("paused-*"))) == 2, processes)
    processes[1].kill()  # in the middle of the second epoch
    assert wait(processes) == [1, -signal.SIGKILL]  # an error, and no hang
    assert not (tmp_path / "run" / "manifest.json").exists()
    train_on(job, tmp_path / "after", num_workers=2)
    assert "0 of 6 steps done" not in printed(tmp_path / "after")
    assert_same_run(tmp_path / "run", undisturbed, relative=1e-4)


def test_sigterm_to_one_worker_saves_and_stops_all(tiny_job, tmp_path, undisturbed):
    job = job_in(tiny_job, tmp_path / "run", checkpoint_every_steps=100)
    processes = start_workers(job, tmp_path / "before", num_workers=2, pause_after=2, pause_seconds=1)
    wait_until(lambda: len(list((tmp_path / "run").glob("paused-*"))) == 2, processes)
    processes[1].terminate()
    assert wait(processes) == [1, 1]
    assert printed(tmp_path / "before").count("StoppedError: stopped as requested after step 3 of 6") == 2
    assert committed_steps(tmp_path / "run") == [3]
    train_on(job, tmp_path / "after", num_workers=2)
    assert "3 of 6 steps done" in printed(tmp_path / "after")
    assert_same_run(tmp_path / "run", undisturbed, relative=1e-4)


def test_a_loss_that_is_not_finite_stops_all_workers_and_names_its_block(tiny_job, tmp_path):
    """The block is in one worker's slice; the other must not wait for it."""
    table = pq.read_table(tiny_job.files[1].path)
    tails = [list(tail) for tail in table["tail_mass"].to_pylist()]
    tails[2] = [math.nan] * len(tails[2])
    column = list_column([np.array(tail, np.float32) for tail in tails], pa.float32())
    table = table.set_column(table.schema.get_field_index("tail_mass"), table.schema.field("tail_mass"), column)
    broken = save(table, tmp_path / "broken.parquet")
    job = replace(job_in(tiny_job, tmp_path / "run"), files=(tiny_job.files[0], broken))
    assert wait(start_workers(job, tmp_path, num_workers=2)) == [1, 1]
    texts = [path.read_text() for path in sorted(tmp_path.glob("worker-*.txt"))]
    messages = [next(line for line in text.splitlines() if "FloatingPointError: " in line) for text in texts]
    assert all("on blocks broken.parquet:2; the last checkpoint" in message for message in messages)
    records = read_log(tmp_path / "run")
    assert 7 not in [block for record in records for block in record.blocks]


def test_a_gradient_that_is_not_finite_stops_all_workers(tiny_job, tmp_path):
    job = job_in(tiny_job, tmp_path / "run", learning_rate=1e30, clip_norm=1e30)
    assert wait(start_workers(job, tmp_path, num_workers=2)) == [1, 1]
    assert printed(tmp_path).count("FloatingPointError: step 2: the gradient's norm is nan on blocks shard-0") == 2


def test_an_error_of_one_worker_is_raised_on_all(tiny_job, tmp_path):
    wrong = replace(tiny_job.files[1], sha256="0" * 64)  # the second worker checks the second file
    job = replace(job_in(tiny_job, tmp_path / "run"), files=(tiny_job.files[0], wrong))
    assert wait(start_workers(job, tmp_path, num_workers=2)) == [1, 1]
    texts = [(tmp_path / f"worker-{rank}.txt").read_text() for rank in range(2)]
    assert "RuntimeError: worker 1 failed: ValueError: " in texts[0]
    assert all("then `make fuse`" in text for text in texts)


def test_workers_that_cannot_share_the_batch_are_refused(tiny_job, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"num_workers x micro_batch_size = 3 x 1 = 3.* num_workers to 1, 2, 4"):
        train(job_in(tiny_job, tmp_path))


def test_workers_that_share_no_disk_are_refused_before_the_first_step(tiny_job, tmp_path):
    """Two machines with a folder of the same name each, and no object store."""
    outputs = [tmp_path / "node-0", tmp_path / "node-1"]
    job = job_in(tiny_job, tmp_path / "run")
    assert wait(start_workers(job, tmp_path, num_workers=2, outputs=outputs)) == [1, 1]
    texts = [path.read_text() for path in sorted(tmp_path.glob("worker-*.txt"))]
    host = socket.gethostname()
    for text in texts:
        assert f"ValueError: worker 1 on {host} does not see what worker 0 on {host} wrote to {tmp_path}" in text
        assert (
            "Give a run directory on a disk that all machines share (RUN=/shared/...), or one in an object store"
            in text
        )
    assert [list(output.iterdir()) for output in outputs] == [[], []], "no step was taken, and nothing is left behind"


def test_a_worker_that_does_not_see_the_disk_of_the_command_is_refused(tiny_job, tmp_path):
    (tmp_path / ".started-here").touch()
    with pytest.raises(ValueError, match=r"worker 0 on .* does not see what the command that started it wrote to"):
        train(job_in(tiny_job, tmp_path), marker=".started-elsewhere")
    assert train(job_in(tiny_job, tmp_path), marker=".started-here").num_steps == 6


def test_a_folder_that_cannot_be_written_says_what_to_set(tiny_job, tmp_path, monkeypatch):
    write_text = Path.write_text

    def refused(path: Path, text: str) -> int:
        if path.name.startswith(".seen-"):
            raise PermissionError(13, "Permission denied")
        return write_text(path, text)

    monkeypatch.setattr(Path, "write_text", refused)
    job = job_in(tiny_job, tmp_path)
    with pytest.raises(
        ValueError, match=r"Permission denied.: give a run directory that every machine of the cluster can"
    ):
        train(job)
    with pytest.raises(
        ValueError, match=r"set engine\.scratch to a folder that every machine of the cluster can write"
    ):
        train(replace(job, checkpoint_store=f"memory:/{tmp_path}"))
