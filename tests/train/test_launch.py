import pytest

from tests.train.conftest import job_in
from tests.train.test_loop import assert_same_weights, without_timing
from train.loop import train
from train.run_log import read_log


@pytest.mark.ray
def test_ray_train_gives_what_the_plain_loop_gives_and_does_not_run_twice(tiny_job, tmp_path):
    import ray

    from train import launch

    plain = train(job_in(tiny_job, tmp_path / "plain", num_epochs=1))
    job = job_in(tiny_job, tmp_path / "ray", num_epochs=1)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        found = launch.run(job)
        again = launch.run(job)
    finally:
        ray.shutdown()
    assert found.num_steps == 3
    assert not found.was_done
    assert_same_weights(found.model_folder, plain.model_folder)
    assert without_timing(read_log(tmp_path / "ray")) == without_timing(read_log(tmp_path / "plain"))
    assert again.was_done


def test_a_url_is_refused_before_ray_starts(tiny_job):
    from dataclasses import replace

    import ray

    from train import launch

    with pytest.raises(ValueError, match="local folder"):
        launch.run(replace(tiny_job, output="s3://bucket/train"))
    assert not ray.is_initialized()
