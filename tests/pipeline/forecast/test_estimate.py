"""The arithmetic of ``ptafuse plan``, against figures worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.forecast.estimate import (
    Assumed,
    Cost,
    align_cost,
    cost_of,
    forward_cost,
    fuse_cost,
    shard_bytes,
    shard_cost,
    topk_bytes,
    train_bytes,
    train_cost,
)
from pipeline.settings.load import load_config
from pipeline.settings.planning import AssumptionsConfig, PricesConfig
from pipeline.settings.run import RunConfig


@pytest.fixture
def assumed() -> Assumed:
    return Assumed(AssumptionsConfig())


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config("pipeline/configs/llama2_7b.toml")


def test_seven_billion_parameters_over_minipile_take_fifteen_gpu_hours(assumed: Assumed) -> None:
    cost = forward_cost(1.5e9, 7e9, gpu=True, assumed=assumed)
    assert cost.gpu_hours == pytest.approx(15, rel=0.01)
    assert cost.core_hours == 0
    assert assumed.used == {"gpu_forward_rate"}


def test_rates_of_a_core_are_the_ones_that_were_measured(assumed: Assumed) -> None:
    forward = forward_cost(1153.0, 134.5e6, gpu=False, assumed=assumed)
    assert forward.core_hours * 3600 == pytest.approx(2, rel=0.02)
    trained = train_cost(243.0, 134.5e6, gpu=False, checkpointing=False, assumed=assumed)
    assert trained.core_hours * 3600 == pytest.approx(2, rel=0.05)


def test_training_is_six_operations_a_token_and_parameter_and_eight_with_checkpointing(assumed: Assumed) -> None:
    plain = train_cost(1e9, 7e9, gpu=True, checkpointing=False, assumed=assumed)
    assert plain.gpu_hours == pytest.approx(6 * 1e9 * 7e9 / (0.4 * 989e12) / 3600, rel=0.01)
    again = train_cost(1e9, 7e9, gpu=True, checkpointing=True, assumed=assumed)
    assert again.gpu_hours == pytest.approx(plain.gpu_hours * 8 / 6)


def test_stages_of_the_cpu_take_their_rates(assumed: Assumed, config: RunConfig) -> None:
    assert shard_cost([330_000 * 1800, 330_000 * 1800], assumed) == Cost(core_hours=1.0)
    assert align_cost(27_000 * 3600, config, assumed) == Cost(core_hours=1.0)
    boundary = config.model_copy(update={"align": config.align.model_copy(update={"pairing": "boundary"})})
    assert align_cost(40_000 * 3600, boundary, assumed) == Cost(core_hours=1.0)
    assert fuse_cost(105_000 * 3600, assumed) == Cost(core_hours=1.0)


def test_bytes(assumed: Assumed) -> None:
    assert shard_bytes(1000, assumed) == pytest.approx(700)
    assert topk_bytes(1000, 10, assumed) == pytest.approx(42_000)
    assert train_bytes(7e9, keep_checkpoints=2) == pytest.approx(7e9 * 28)


def test_the_price_of_a_gpu_includes_its_workers_cores() -> None:
    assert cost_of(7200, cpus=4, gpus=0) == Cost(core_hours=8)
    assert cost_of(7200, cpus=4, gpus=2) == Cost(gpu_hours=4)


def test_price_is_the_sum_and_none_without_a_price_that_is_needed() -> None:
    cost = Cost(gpu_hours=2, core_hours=10)
    assert cost.price(PricesConfig(gpu_hour=3, core_hour=0.05)) == pytest.approx(6.5)
    assert cost.price(PricesConfig(gpu_hour=3)) is None
    assert Cost(gpu_hours=2).price(PricesConfig(gpu_hour=3)) == 6
    assert Cost().price(PricesConfig()) == 0


@given(*[st.floats(0, 1e6) for _ in range(4)], st.floats(0, 100))
def test_prices_add_up(gpu: float, core: float, other_gpu: float, other_core: float, factor: float) -> None:
    prices = PricesConfig(gpu_hour=2.5, core_hour=0.04)
    one, other = Cost(gpu, core), Cost(other_gpu, other_core)
    whole, first, second = ((one + other * factor).price(prices), one.price(prices), other.price(prices))
    assert whole == pytest.approx((first or 0) + factor * (second or 0))


@pytest.mark.parametrize("name", list(AssumptionsConfig.model_fields))
def test_every_assumption_says_where_it_is_from(name: str) -> None:
    assert len(AssumptionsConfig.model_fields[name].description or "") > 30
