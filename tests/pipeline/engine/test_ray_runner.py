"""How Ray Data is told to spread shards, and that its actor pool does."""

import dataclasses
from types import SimpleNamespace

import pytest
from ray.data._internal.execution.operators import actor_pool_map_operator as ray_pool

from pipeline.engine import cluster, ray_runner
from pipeline.run.specs import Resources
from pipeline.settings.run import EngineConfig

TWO_AT_ONCE = Resources(None, cpus=1, gpus=1, models=True, shards_per_worker=2)
FIXED = EngineConfig(autoscaling=False)


@pytest.fixture(autouse=True)
def _four_gpus(monkeypatch):
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8, "GPU": 4}}])


@pytest.mark.parametrize(("num_pending", "num_actors", "at_once"), [(1, 1, 1), (3, 3, 1), (4, 4, 1), (5, 4, 2)])
def test_the_pool_is_sized_by_what_is_pending(num_pending, num_actors, at_once):
    pool = ray_runner.actor_pool(TWO_AT_ONCE, num_pending, FIXED)
    assert (pool.min_size, pool.max_size) == (1, num_actors)
    assert pool.max_tasks_in_flight_per_actor == at_once
    assert pool.max_concurrent_calls_per_actor == at_once, "none is given that only waits"
    assert pool.enable_true_multi_threading is (at_once == 2)


def test_stages_that_do_not_overlap_have_one_shard_and_one_thread_per_actor():
    pool = ray_runner.actor_pool(dataclasses.replace(TWO_AT_ONCE, shards_per_worker=1), 500, FIXED)
    assert pool.max_tasks_in_flight_per_actor == pool.max_concurrent_calls_per_actor == 1
    assert not pool.enable_true_multi_threading


class Dispatcher:
    """Ray Data's choice of an actor, with actors that are names.

    This is private code of Ray, which ``actor_pool`` relies on: where a new Ray breaks it, look how that one spreads tasks.
    """

    def __init__(self, num_actors: int, at_once: int) -> None:
        self.in_flight = {f"actor {number}": 0 for number in range(num_actors)}
        self.at_once = at_once

    def give(self) -> str | None:
        """Give a shard to the actor that Ray Data chooses; None where all have as many as they may."""
        heap = ray_pool.heapdict()
        for actor, count in self.in_flight.items():
            heap[actor] = ray_pool._ActorRank(count)
        state = SimpleNamespace(
            _alive_actors_to_in_flight_tasks_heap=heap, max_tasks_in_flight_per_actor=lambda: self.at_once
        )
        actor = ray_pool._ActorPool.select_actors(state, bundle=None)
        if actor is not None:
            self.in_flight[actor] += 1
        return actor


@pytest.mark.parametrize("num_shards", [5, 6, 7, 8])
def test_ray_data_gives_every_actor_its_first_shard_before_any_gets_its_second(num_shards):
    dispatcher = Dispatcher(4, at_once=2)
    given = [dispatcher.give() for _ in range(num_shards)]
    assert len(set(given[:4])) == 4
    assert max(dispatcher.in_flight.values()) - min(dispatcher.in_flight.values()) <= 1
    assert all(count <= 2 for count in dispatcher.in_flight.values())


def test_ray_data_gives_no_actor_more_than_it_may_have():
    dispatcher = Dispatcher(2, at_once=1)
    assert [dispatcher.give() is None for _ in range(3)] == [False, False, True]
    dispatcher.in_flight["actor 1"] = 0
    assert dispatcher.give() == "actor 1", "the one that is done gets the next"
