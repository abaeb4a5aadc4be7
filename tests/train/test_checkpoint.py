from dataclasses import replace

import pytest
import torch
from torch import nn

from train.checkpoint import (
    COMMITTED,
    TrainState,
    checkpoint_folder,
    committed_steps,
    load_newest_checkpoint,
    save_checkpoint,
)

STATE = TrainState(fingerprint="abc", dataset="d", seed=42, num_blocks=10, step=0, epoch=0, next_sample=0, num_tokens=0)


class Tied(nn.Module):
    """A tied head, a bias, and a buffer of each kind."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.layer = nn.Linear(3, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("count", torch.zeros(2))
        self.register_buffer("cache", torch.zeros(2), persistent=False)


def trained(seed: int, steps: int = 3) -> tuple[Tied, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model.head(model.layer(model.embedding(torch.tensor([1, 2])))).square().sum().backward()
        optimizer.step()
    model.count += seed
    return model, optimizer


def test_a_checkpoint_restores_weights_buffers_and_optimizer(tmp_path):
    model, optimizer = trained(1)
    state = replace(STATE, step=500, epoch=1, next_sample=12, num_tokens=99)
    folder = save_checkpoint(tmp_path, model, optimizer, state, keep=2)
    assert folder.name == "checkpoint-000500"
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        COMMITTED,
    }
    other, other_optimizer = trained(2, steps=0)
    assert load_newest_checkpoint(tmp_path, other, other_optimizer, expected=STATE) == state
    assert other.head.weight is other.embedding.weight
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[one].keys() == other_optimizer.state[two].keys()
        for key, value in optimizer.state[one].items():
            assert torch.equal(value, other_optimizer.state[two][key])


def test_without_a_checkpoint_the_run_begins_at_the_beginning(tmp_path):
    model, optimizer = trained(1, steps=0)
    assert load_newest_checkpoint(tmp_path, model, optimizer, expected=STATE) == STATE


def test_a_checkpoint_without_the_commit_mark_is_ignored_and_written_over(tmp_path):
    model, optimizer = trained(1)
    save_checkpoint(tmp_path, model, optimizer, replace(STATE, step=2), keep=5)
    save_checkpoint(tmp_path, model, optimizer, replace(STATE, step=4), keep=5)
    (checkpoint_folder(tmp_path, 4) / COMMITTED).unlink()  # killed before the commit
    (checkpoint_folder(tmp_path, 4) / "model.safetensors").write_bytes(b"half")
    assert committed_steps(tmp_path) == [2]
    assert load_newest_checkpoint(tmp_path, *trained(2, steps=0), expected=STATE).step == 2
    save_checkpoint(tmp_path, model, optimizer, replace(STATE, step=4), keep=5)
    assert load_newest_checkpoint(tmp_path, *trained(2, steps=0), expected=STATE).step == 4


def test_old_checkpoints_and_leftovers_before_them_are_removed(tmp_path):
    model, optimizer = trained(1)
    checkpoint_folder(tmp_path, 1).mkdir()
    (tmp_path / "checkpoint-notes").mkdir()
    for step in (2, 4, 6):
        save_checkpoint(tmp_path, model, optimizer, replace(STATE, step=step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-000004",
        "checkpoint-000006",
        "checkpoint-notes",
    ]


@pytest.mark.parametrize(("name", "value"), [("fingerprint", "xyz"), ("dataset", "e"), ("seed", 1), ("num_blocks", 11)])
def test_a_checkpoint_of_another_job_is_refused(tmp_path, name, value):
    save_checkpoint(tmp_path, *trained(1), replace(STATE, step=2), keep=2)
    with pytest.raises(ValueError, match=f"its {name} is"):
        load_newest_checkpoint(tmp_path, *trained(1), expected=replace(STATE, **{name: value}))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save_checkpoint(tmp_path, *trained(1), replace(STATE, step=2), keep=2)
    model = Tied()
    model.layer = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="layer"):
        load_newest_checkpoint(tmp_path, model, torch.optim.AdamW(model.parameters()), expected=STATE)
    del model.layer
    with pytest.raises(ValueError, match="does not fit"):
        load_newest_checkpoint(tmp_path, model, torch.optim.AdamW(model.parameters()), expected=STATE)
