"""Seconds of overlapping work."""

from stages.contract import busy_time
from stages.contract.busy_time import BusyTime


def seconds_of(monkeypatch, pieces):
    """Return what each piece of work gets; pieces: when it began and when it ended, in the order of the ends."""
    busy = BusyTime()
    found = []
    for started, ended in pieces:
        monkeypatch.setattr(busy_time.time, "monotonic", lambda ended=ended: ended)
        found.append(busy.finish(started))
    return found


def test_work_one_after_the_other_gets_its_own_duration(monkeypatch):
    assert seconds_of(monkeypatch, [(0, 3), (3, 5), (9, 10)]) == [3, 2, 1]


def test_no_second_of_overlapping_work_is_counted_twice(monkeypatch):
    found = seconds_of(monkeypatch, [(0, 10), (1, 18), (10, 26), (19, 27)])
    assert found == [10, 8, 8, 1]
    assert sum(found) == 27
