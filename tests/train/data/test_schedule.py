import numpy as np
import pytest
from pydantic import ValidationError

from train.config import TrainConfig
from train.data import schedule
from train.data.blocks import epoch_order
from train.data.schedule import Schedule, lambda_at


def test_lambda_is_constant_by_default():
    config = TrainConfig(**{"lambda": 0.7})
    assert [lambda_at(step, 5, config) for step in range(5)] == [0.7] * 5


def test_linear_lambda_goes_from_its_value_to_its_end():
    config = TrainConfig(**{"lambda": 1.0}, lambda_schedule="linear", lambda_end=0.5)
    assert [lambda_at(step, 5, config) for step in range(5)] == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.5])
    assert lambda_at(0, 1, config) == 1.0
    assert config.uses_fusion


@pytest.mark.parametrize("settings", [{"lambda_schedule": "linear"}, {"lambda_end": 0.5}])
def test_an_end_without_its_schedule_is_refused(settings):
    with pytest.raises(ValidationError, match="go together"):
        TrainConfig(**settings)


def test_fusion_is_used_where_any_step_weighs_it():
    assert not TrainConfig(**{"lambda": 1.0}).uses_fusion
    assert TrainConfig(**{"lambda": 1.0}, lambda_schedule="linear", lambda_end=0.9).uses_fusion
    assert TrainConfig(**{"lambda": 0.5}, lambda_schedule="linear", lambda_end=1.0).uses_fusion


def test_the_blocks_are_permuted_once_an_epoch(monkeypatch):
    epochs: list[int] = []

    def counted(num_blocks: int, *, seed: int, epoch: int) -> np.ndarray:
        epochs.append(epoch)
        return epoch_order(num_blocks, seed=seed, epoch=epoch)

    monkeypatch.setattr(schedule, "epoch_order", counted)
    steps = Schedule(num_blocks=10, batch_size=3, num_epochs=3, seed=7)
    for step in range(steps.num_steps):
        steps.blocks(step)
    assert epochs == [0, 1, 2]


def test_the_order_does_not_depend_on_which_steps_were_asked_for_before():
    steps = Schedule(num_blocks=10, batch_size=3, num_epochs=3, seed=7)
    for step in [11, 0, 5, 4, 11, 1]:
        expected = Schedule(num_blocks=10, batch_size=3, num_epochs=3, seed=7).blocks(step)
        found = steps.blocks(step)
        np.testing.assert_array_equal(found, expected)
        with pytest.raises(ValueError, match="read-only"):
            found[0] = 0
