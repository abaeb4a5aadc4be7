import os
import signal
import threading

import pytest

from tests.train.conftest import job_in
from train.checkpoints.folders import committed_steps
from train.loop import train
from train.preemption import Notice, StoppedError, on_termination, termination_watch
from train.run_log import read_log


def test_sigterm_is_a_notice_and_no_end_while_watched():
    before = signal.getsignal(signal.SIGTERM)
    with termination_watch() as watch:
        assert watch() == Notice.NONE
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch() == Notice.STOP
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_signal_handler_is_kept_outside_the_main_thread():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run():
        with on_termination(lambda: None):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_request_to_stop_saves_first_and_training_resumes_there(tiny_job, tmp_path):
    train(job_in(tiny_job, tmp_path / "plain"))
    job = job_in(tiny_job, tmp_path / "run", checkpoint_every_steps=100)
    with pytest.raises(StoppedError, match="after step 2 of 6"):
        train(job, on_step=lambda record: record.step == 1 and os.kill(os.getpid(), signal.SIGTERM))
    assert committed_steps(tmp_path / "run") == [2]
    train(job)
    found, expected = read_log(tmp_path / "run"), read_log(tmp_path / "plain")
    assert [(r.step, r.loss, r.blocks) for r in found] == [(r.step, r.loss, r.blocks) for r in expected]


def test_a_notice_that_a_machine_will_go_saves_once_and_trains_on(tiny_job, tmp_path):
    saved = []

    def on_step(record):
        saved.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))

    answers = iter([Notice.NONE, Notice.SAVE, Notice.SAVE, Notice.SAVE, Notice.SAVE, Notice.SAVE])
    result = train(job_in(tiny_job, tmp_path, checkpoint_every_steps=100), on_step=on_step, watch=lambda: next(answers))
    assert result.num_steps == 6
    assert saved[0] == []
    assert saved[-2] == ["checkpoint-000002"]  # the last step saves in any case
