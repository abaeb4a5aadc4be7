import sys
import types
from dataclasses import replace

import pytest

from tests.train.conftest import job_in
from tests.train.model.test_card import RECORD
from train import run_log
from train.config import TrainConfig
from train.loop import train
from train.run_log import RunLog, check_wandb, read_log


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


def test_an_interrupted_run_is_told_to_wandb_as_failed(tmp_path, wandb):
    log = RunLog(tmp_path, step=0, wandb=wandb)
    log.__exit__(ValueError, ValueError("stop"), None)
    assert wandb.exit_codes == [1]


def test_wandb_that_is_not_installed_is_refused_before_anything_is_loaded(tiny_job, tmp_path, monkeypatch):
    monkeypatch.setattr(run_log.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"ptafuse\[wandb\]"):
        train(job_in(tiny_job, tmp_path, wandb=True))
    check_wandb(TrainConfig(wandb=False))


def test_what_is_not_known_is_left_out(tmp_path, wandb):
    with RunLog(tmp_path, step=0, wandb=wandb) as log:
        log.add(RECORD)
        log.add(replace(RECORD, step=4, mfu=0.4))
    assert "mfu" not in wandb.logged[0][1]
    assert "loss_fusion" not in wandb.logged[0][1]
    assert wandb.logged[1][1]["mfu"] == 0.4
    assert [record.mfu for record in read_log(tmp_path)] == [None, 0.4]
