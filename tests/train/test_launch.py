import pytest

from tests.tiny_run import environment
from tests.train.conftest import job_in
from tests.train.test_workers import assert_same_run
from train.loop import train


@pytest.mark.ray
def test_ray_train_restarts_killed_workers_and_gives_what_the_plain_loop_gives(tiny_job, tmp_path):
    """Two workers; one is killed when the second step's checkpoint is committed."""
    import ray

    from train import launch

    train(job_in(tiny_job, tmp_path / "plain"))
    job = job_in(tiny_job, tmp_path / "ray", num_workers=2)
    faults = environment(PTAFUSE_FAULT=f"die:train:2:{tmp_path}")
    variables = {name: faults[name] for name in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PTAFUSE_FAULT")}
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": variables},
    )
    try:
        found = launch.run(job)
        again = launch.run(job)
    finally:
        ray.shutdown()
    assert (tmp_path / "die-train").exists()
    assert found.num_steps == 6
    assert not found.was_done
    assert again.was_done
    assert_same_run(tmp_path / "ray", tmp_path / "plain", relative=1e-4)


def test_a_url_is_refused_before_ray_starts(tiny_job):
    from dataclasses import replace

    import ray

    from train import launch

    with pytest.raises(ValueError, match="local folder"):
        launch.run(replace(tiny_job, output="s3://bucket/train"))
    assert not ray.is_initialized()
