import numpy as np
import pytest

from stages.align.costs.pair_cache import NO_PAIR, PairCache


def square(keys: np.ndarray) -> np.ndarray:
    return keys**2


@pytest.mark.parametrize("num_slots", [2, 8, 64, 4096])
def test_a_full_table_gives_the_same_values(num_slots):
    rng = np.random.default_rng(0)
    cache = PairCache(num_slots)
    for _ in range(30):
        keys = rng.integers(-1, 90, 40)
        assert cache.lookup(keys, square).tolist() == np.where(keys == NO_PAIR, 0, keys**2).tolist()
        assert cache.num_cached <= num_slots // 2


def test_a_key_is_computed_once():
    asked = []

    def compute(keys: np.ndarray) -> np.ndarray:
        asked.extend(keys.tolist())
        return square(keys)

    cache = PairCache(64)
    for _ in range(3):
        cache.lookup(np.array([3, 5, 3, NO_PAIR]), compute)
    assert sorted(asked) == [3, 5]
    assert cache.num_cached == 2


def test_no_keys_have_no_values():
    assert PairCache(8).lookup(np.empty(0, np.int64), square).shape == (0,)


def test_a_number_of_slots_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="power of two"):
        PairCache(12)


def test_a_failed_computation_leaves_no_wrong_value_behind():
    cache = PairCache(64)
    keys = np.arange(10)

    def fail(_):
        raise MemoryError

    with pytest.raises(MemoryError):
        cache.lookup(keys, fail)
    assert cache.lookup(keys, lambda missing: missing * 2.0 + 1).tolist() == (keys * 2.0 + 1).tolist()
