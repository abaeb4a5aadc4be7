"""What sets two steps apart."""

from pipeline.forecast.changes import setting_changes


def test_a_record_that_names_no_version_says_nothing_about_it() -> None:
    before = {"train": {"learning_rate": 1e-3}}
    now = {"train": {"learning_rate": 2e-3}, "version": 2}
    assert setting_changes(before, now) == ["train.learning_rate: 0.001 -> 0.002"]


def test_another_version_is_a_reason() -> None:
    assert setting_changes({"version": 1}, {"version": 2}) == [
        "the stage's code now computes different rows: version 1 -> 2"
    ]
