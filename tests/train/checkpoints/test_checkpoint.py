from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from train.checkpoints.checkpoint import Checkpoints, TrainState
from train.checkpoints.folders import COMMITTED, checkpoint_folder, committed_steps
from train.distributed import Workers, join_workers

STATE = TrainState(fingerprint="abc", dataset="d", seed=42, num_blocks=10, step=0, epoch=0, next_sample=0, num_tokens=0)


@pytest.fixture
def alone():
    with join_workers(torch.device("cpu")) as workers:
        yield workers


class Tied(nn.Module):
    """A tied head, a bias, a frozen parameter, and a buffer of each kind."""

    def __init__(self, width: int = 3):
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.layer = nn.Linear(3, width)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(2, 2)
        self.frozen.requires_grad_(False)
        self.register_buffer("count", torch.zeros(2))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, ids):
        return self.head(self.layer(self.embedding(ids)))


def trained(workers: Workers, seed: int, steps: int = 3, width: int = 3) -> tuple[Tied, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Tied(width)
    fully_shard(model, mesh=workers.mesh)
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=0.1)
    for _ in range(steps):
        step(model, optimizer)
    model.count += seed
    return model, optimizer


def step(model: Tied, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.tensor([1, 2])).square().sum().backward()
    optimizer.step()


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        for name, value in model.state_dict().items()
    }


def checkpoints(output, pair, workers, *, keep: int = 2) -> Checkpoints:
    return Checkpoints(output, *pair, workers, keep=keep)


def save(output, pair, workers, *states: TrainState, keep: int = 2) -> None:
    with checkpoints(output, pair, workers, keep=keep) as saved:
        for state in states:
            saved.save(state)


def restore(output, pair, workers, *, expected: TrainState = STATE) -> TrainState:
    with checkpoints(output, pair, workers) as saved:
        return saved.restore(expected)


def test_a_checkpoint_restores_weights_buffers_and_optimizer(tmp_path, alone):
    model, optimizer = trained(alone, 1)
    state = replace(STATE, step=500, epoch=1, next_sample=12, num_tokens=99)
    save(tmp_path, (model, optimizer), alone, state)
    folder = tmp_path / "checkpoint-000500"
    assert {path.name for path in folder.iterdir()} == {"__0_0.distcp", ".metadata", "state.json", COMMITTED}
    other, other_optimizer = trained(alone, 2, steps=0)
    frozen = whole(other)["frozen.weight"]
    assert restore(tmp_path, (other, other_optimizer), alone) == state
    assert other.head.weight is other.embedding.weight
    expected = whole(model)
    for name, value in whole(other).items():
        assert torch.equal(value, frozen if name == "frozen.weight" else expected[name]) or name == "frozen.bias"
    for _ in range(2):  # the optimizer's state is the same if the next steps are
        step(model, optimizer)
        step(other, other_optimizer)
    for name, value in whole(other).items():
        assert name.startswith("frozen") or torch.equal(value, whole(model)[name])


def test_training_continues_while_a_checkpoint_is_written(tmp_path, alone):
    model, optimizer = trained(alone, 1)
    expected = whole(model)
    with checkpoints(tmp_path, (model, optimizer), alone) as saved:
        saved.save(replace(STATE, step=1))
        for _ in range(5):
            step(model, optimizer)
    assert not torch.equal(whole(model)["layer.weight"], expected["layer.weight"])
    other = trained(alone, 2, steps=0)
    assert restore(tmp_path, other, alone).step == 1
    assert torch.equal(whole(other[0])["layer.weight"], expected["layer.weight"])


def test_without_a_checkpoint_the_run_begins_at_the_beginning(tmp_path, alone):
    assert restore(tmp_path, trained(alone, 1, steps=0), alone) == STATE


def test_a_checkpoint_without_the_commit_mark_is_ignored_and_removed(tmp_path, alone):
    pair = trained(alone, 1)
    save(tmp_path, pair, alone, replace(STATE, step=2), replace(STATE, step=4), keep=5)
    (checkpoint_folder(tmp_path, 4) / COMMITTED).unlink()  # killed before the commit
    (checkpoint_folder(tmp_path, 4) / "__0_0.distcp").write_bytes(b"half")
    assert committed_steps(tmp_path) == [2]
    assert restore(tmp_path, trained(alone, 2, steps=0), alone).step == 2
    assert not checkpoint_folder(tmp_path, 4).exists()
    save(tmp_path, pair, alone, replace(STATE, step=4), keep=5)
    assert restore(tmp_path, trained(alone, 2, steps=0), alone).step == 4


def test_old_checkpoints_are_removed_and_other_folders_stay(tmp_path, alone):
    pair = trained(alone, 1)
    (tmp_path / "checkpoint-notes").mkdir()
    save(tmp_path, pair, alone, *(replace(STATE, step=step) for step in (2, 4, 6)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-000004",
        "checkpoint-000006",
        "checkpoint-notes",
    ]


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_leaves_the_older_one(tmp_path, alone, monkeypatch):
    import train.checkpoints.checkpoint

    pair = trained(alone, 1)
    save(tmp_path, pair, alone, replace(STATE, step=2))

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.checkpoints.checkpoint, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, pair, alone, replace(STATE, step=4), keep=1)
    monkeypatch.undo()
    assert restore(tmp_path, trained(alone, 2, steps=0), alone).step == 2


@pytest.mark.parametrize("fills_up", [False, True], ids=["before", "while it is written"])
def test_a_disk_without_room_is_said_and_leaves_the_older_one(tmp_path, alone, monkeypatch, fills_up):
    import train.checkpoints.checkpoint as module

    pair = trained(alone, 1)
    save(tmp_path, pair, alone, replace(STATE, step=2))
    real, answers = module.shutil.disk_usage, iter([10**12, 0] if fills_up else [0])
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: real(path)._replace(free=next(answers)))
    if fills_up:
        failed = Future()
        failed.set_exception(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"))
        monkeypatch.setattr(module, "async_save", lambda *_, **__: failed)
    with pytest.raises(OSError, match=r"checkpoint-000004 cannot be written: a checkpoint takes .* GB left. Free some"):
        save(tmp_path, pair, alone, replace(STATE, step=4), keep=1)
    monkeypatch.undo()
    assert restore(tmp_path, trained(alone, 2, steps=0), alone).step == 2


@pytest.mark.parametrize(("name", "value"), [("fingerprint", "xyz"), ("dataset", "e"), ("seed", 1), ("num_blocks", 11)])
def test_a_checkpoint_of_another_job_is_refused(tmp_path, alone, name, value):
    save(tmp_path, trained(alone, 1), alone, replace(STATE, step=2))
    with pytest.raises(ValueError, match=f"its {name} is"):
        restore(tmp_path, trained(alone, 1), alone, expected=replace(STATE, **{name: value}))


def test_a_checkpoint_of_another_model_is_refused(tmp_path, alone):
    save(tmp_path, trained(alone, 1), alone, replace(STATE, step=2))
    with pytest.raises(ValueError, match=r"layer\.\w+ has shape|layer\.weight"):
        restore(tmp_path, trained(alone, 1, steps=0, width=4), alone)
    model, _ = trained(alone, 1, steps=0)
    del model.layer
    with pytest.raises(ValueError, match="does not fit"):
        restore(tmp_path, (model, torch.optim.AdamW(model.embedding.parameters())), alone)
