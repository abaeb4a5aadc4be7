"""The loss curve of a tiny run, as it was when it was last looked at: a change of any number has a reason, or is a fault."""

import pytest

from tests.train.conftest import job_in
from train.loop import train
from train.run_log import read_log

# Of the tiny Llama (seed 0), 11 blocks of 16 tokens, 4 a step, lambda 0.5, learning rate 3e-3, float32.
GOLDEN = (  # L_CLM, L_fusion, norm of the gradient
    (9.518898, 8.198980, 8.586206),
    (9.213459, 7.811466, 8.243455),
    (9.089608, 7.079927, 10.720541),
    (6.332648, 5.831243, 5.719433),
    (5.789275, 6.181601, 5.442199),
    (4.746985, 5.778745, 7.617656),
)


def test_the_loss_curve_is_the_golden_one(tiny_job, tmp_path):
    train(job_in(tiny_job, tmp_path))
    found = [(record.loss_clm, record.loss_fusion, record.grad_norm) for record in read_log(tmp_path)]
    assert len(found) == len(GOLDEN)
    for one, golden in zip(found, GOLDEN, strict=True):
        assert one == pytest.approx(golden, rel=1e-4)
