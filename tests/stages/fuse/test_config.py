"""Settings of the fuse stage: which of them change results, and which make no sense together."""

import pytest
from pydantic import ValidationError

from stages.fuse.config import FuseConfig


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        ({"packing": "whole"}, {"min_context": 7}),
        ({"function": "fitted"}, {"granularity": "token", "unit": "nats-per-token"}),
        ({"function": "target"}, {"granularity": "segment", "unit": "nats-per-token", "per": "kind", "fit_shards": 3}),
        ({"function": "min-ce"}, {"fit_shards": 3}),
        ({}, {"num_workers": 5, "cpus_per_worker": 2}),
    ],
)
def test_a_setting_that_is_not_read_changes_no_fingerprint(settings, unread):
    assert FuseConfig(**settings, **unread).result_settings() == FuseConfig(**settings).result_settings()


@pytest.mark.parametrize(
    ("settings", "read"),
    [
        ({"packing": "cut"}, {"min_context": 7}),
        ({"function": "avg-ce"}, {"granularity": "token"}),
        ({"function": "min-ce"}, {"unit": "nats-per-token"}),
        ({"function": "fitted"}, {"per": "kind"}),
        ({"function": "fitted"}, {"fit_shards": 3}),
    ],
)
def test_a_setting_that_is_read_changes_the_fingerprint(settings, read):
    assert FuseConfig(**settings, **read).result_settings() != FuseConfig(**settings).result_settings()


@pytest.mark.parametrize("function", ["min-ce", "avg-ce"])
def test_kinds_without_fitted_weights_are_refused(function):
    with pytest.raises(ValidationError, match=f"per = 'kind' fits weights .* function = '{function}' fits none"):
        FuseConfig(function=function, per="kind")
