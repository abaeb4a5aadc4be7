import sys
import types
from dataclasses import replace

import pytest

from tests.train.conftest import job_in
from tests.train.model.test_card import RECORD
from train import run_log
from train.config import TrainConfig
from train.loop import train
from train.run_log import LogFollower, RunLog, check_wandb, read_log


class FakeWandb(types.ModuleType):
    """What the project uses of wandb, written by hand."""

    def __init__(self):
        super().__init__("wandb")
        self.settings: dict = {}
        self.logged: list[tuple[int, dict]] = []
        self.exit_codes: list[int] = []

    def init(self, **settings):
        self.settings = settings
        return self

    def log(self, data, step):
        self.logged.append((step, data))

    def finish(self, exit_code):
        self.exit_codes.append(exit_code)


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(run_log.importlib.util, "find_spec", lambda name: fake)
    return fake


def test_steps_go_to_wandb_where_asked_for(tiny_job, tmp_path, wandb):
    train(job_in(tiny_job, tmp_path, num_epochs=1, wandb="my-project"))
    assert wandb.settings["project"] == "my-project"
    assert wandb.settings["id"] == tiny_job.fingerprint
    assert [step for step, _ in wandb.logged] == [1, 2, 3]
    assert wandb.logged[0][1]["loss_fusion"] == read_log(tmp_path)[0].loss_fusion
    assert wandb.logged[0][1]["lambda"] == 0.5
    assert wandb.exit_codes == [0]


def test_an_interrupted_run_is_reported_to_wandb_as_failed(tmp_path, wandb):
    log = RunLog(tmp_path, step=0, wandb=wandb)
    log.__exit__(ValueError, ValueError("stop"), None)
    assert wandb.exit_codes == [1]


def test_wandb_that_is_not_installed_is_refused_before_anything_is_loaded(tiny_job, tmp_path, monkeypatch):
    monkeypatch.setattr(run_log.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"ptafuse\[wandb\]"):
        train(job_in(tiny_job, tmp_path, wandb=True))
    check_wandb(TrainConfig(wandb=False))


def test_values_that_are_none_are_not_logged(tmp_path, wandb):
    with RunLog(tmp_path, step=0, wandb=wandb) as log:
        log.add(RECORD)
        log.add(replace(RECORD, step=4, mfu=0.4))
    assert "mfu" not in wandb.logged[0][1]
    assert "loss_fusion" not in wandb.logged[0][1]
    assert wandb.logged[1][1]["mfu"] == 0.4
    assert [record.mfu for record in read_log(tmp_path)] == [None, 0.4]


def test_a_follower_reads_each_record_once_and_again_what_was_computed_again(tmp_path):
    follower = LogFollower(tmp_path)
    assert (follower.read(), follower.step) == ([], 0)
    with RunLog(tmp_path, step=0) as log:
        log.add(replace(RECORD, step=1))
        log.add(replace(RECORD, step=2))
        assert [record.step for record in follower.read()] == [1, 2]
        log.add(replace(RECORD, step=3))
        assert ([record.step for record in follower.read()], follower.step) == ([3], 3)
    assert follower.read() == []
    with RunLog(tmp_path, step=1) as log:
        assert (follower.read(), follower.step) == ([], 1)
        log.add(replace(RECORD, step=2, loss=0.5))
        log.add(replace(RECORD, step=3))
        assert [record.step for record in follower.read()] == [2, 3]
    (tmp_path / "log.jsonl").unlink()
    assert (follower.read(), follower.step) == ([], 0)


def test_a_follower_reads_a_log_that_grew_past_the_old_one_before_it_looked(tmp_path):
    follower = LogFollower(tmp_path)
    for speed, steps in ((5.0, [1, 2]), (6.0, [1, 2, 3, 4])):
        with RunLog(tmp_path, step=0) as log:
            for step in steps:
                log.add(replace(RECORD, step=step, tokens_per_second=speed))
        assert [(record.step, record.tokens_per_second) for record in follower.read()] == [(n, speed) for n in steps]
