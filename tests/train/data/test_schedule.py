import pytest
from pydantic import ValidationError

from train.config import TrainConfig
from train.data.schedule import lambda_at


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
